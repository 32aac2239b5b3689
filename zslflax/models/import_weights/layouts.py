"""Layouts of published checkpoints: the name of each weight of a tower in torchvision, timm and Hugging Face."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

Names = str | tuple[str, ...]  # several names for weights that are one in the tower (query, key and value)


class Layout(NamedTuple):
    """How a family of checkpoints names its weights.

    Attributes:
        anchor: the name of a weight that each of these checkpoints has. Whatever precedes it is the prefix of all
            names in the checkpoint.
        module: maps the path of a module in the tower, such as "block_0/mlp/fc1", to its name in the checkpoint.
    """

    anchor: str
    module: Callable[[str], Names]


MOBILENET_BLOCK = ("expand_conv", "expand_bn", "depthwise_conv", "depthwise_bn", "project_conv", "project_bn")

HF_VIT_NAMES = {
    "patch_embed": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "attention/qkv": "attention.attention.{}",
    "attention/out": "attention.output.dense",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "norm": "layernorm",
}


def torchvision_resnet(path: str) -> str:
    """Returns torchvision's name of a ResNet's module.

    >>> torchvision_resnet("layer2_0/downsample_conv")
    'layer2.0.downsample.0'
    """
    path = re.sub(r"layer(\d+)_(\d+)/", r"layer\1/\2/", path)
    return path.replace("downsample_conv", "downsample/0").replace("downsample_bn", "downsample/1").replace("/", ".")


def hf_resnet(path: str) -> str:
    """Returns Hugging Face's name of a ResNet's module.

    >>> hf_resnet("layer2_0/downsample_conv")
    'encoder.stages.1.layers.0.shortcut.convolution'
    """
    *block, module = path.split("/")
    kind = "convolution" if "conv" in module else "normalization"
    if not block:
        return f"embedder.embedder.{kind}"
    stage, index = block[0].removeprefix("layer").split("_")
    part = "shortcut" if module.startswith("downsample") else f"layer.{int(module[-1]) - 1}"
    return f"encoder.stages.{int(stage) - 1}.layers.{index}.{part}.{kind}"


def torchvision_mobilenet(path: str) -> str:
    """Returns torchvision's name of a MobileNetV2's module.

    >>> torchvision_mobilenet("block_3/project_bn"), torchvision_mobilenet("block_0/project_bn")
    ('features.4.conv.3', 'features.1.conv.2')
    """
    expand, first = ("0.0", "0.1"), ("0.0", "0.1", "1", "2")
    return mobilenet_features(path, (*expand, "1.0", "1.1", "2", "3"), first)


def flat_mobilenet(path: str) -> str:
    """Returns the name of a MobileNetV2's module where a block is one flat sequence, as in older releases.

    >>> flat_mobilenet("block_3/project_bn"), flat_mobilenet("block_0/project_bn")
    ('features.4.conv.7', 'features.1.conv.4')
    """
    return mobilenet_features(path, ("0", "1", "3", "4", "6", "7"), ("0", "1", "3", "4"))


def mobilenet_features(path: str, block_names: Sequence[str], first_names: Sequence[str]) -> str:
    """Returns the name of a MobileNetV2's module under "features".

    Args:
        path: of the module in the tower.
        block_names: of the six modules of a block.
        first_names: of the four modules of the first block, which does not expand its input.
    """
    if "/" not in path:
        part, kind = path.split("_")
        return f"features.{0 if part == 'stem' else 18}.{0 if kind == 'conv' else 1}"
    number, module = split_block(path)
    names = dict(zip(MOBILENET_BLOCK, block_names) if number else zip(MOBILENET_BLOCK[2:], first_names))
    return f"features.{number + 1}.conv.{names[module]}"


def efficientnet_pytorch(path: str) -> str:
    """Returns the name of an EfficientNet-Lite's module in the package efficientnet_lite_pytorch.

    >>> efficientnet_pytorch("block_3/project_bn"), efficientnet_pytorch("head_bn")
    ('_blocks.3._bn2', '_bn1')
    """
    names = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "head_conv": "_conv_head", "head_bn": "_bn1"}
    if "/" not in path:
        return names[path]
    number, module = split_block(path)
    norms = {"expand_bn": "_bn0", "depthwise_bn": "_bn1", "project_bn": "_bn2"}
    return f"_blocks.{number}.{norms.get(module, '_' + module)}"


def timm_mobilenet(path: str, blocks: Sequence[int]) -> str:
    """Returns timm's name of a module of MobileNetV2 or EfficientNet-Lite; `blocks` has the number in each stage.

    >>> timm_mobilenet("block_3/project_bn", [1, 2, 2])
    'blocks.2.0.bn3'
    """
    names = {"stem_conv": "conv_stem", "stem_bn": "bn1", "head_conv": "conv_head", "head_bn": "bn2"}
    if "/" not in path:
        return names[path]
    number, module = split_block(path)
    order: Sequence[str] = MOBILENET_BLOCK
    convs: Sequence[str] = ("conv_pw", "conv_dw", "conv_pwl")
    if number < blocks[0]:  # the blocks of the first stage do not expand their input
        order, convs = order[2:], ("conv_dw", "conv_pw")
    layer, is_norm = divmod(order.index(module), 2)
    stage = 0
    while number >= blocks[stage]:
        number -= blocks[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{f'bn{layer + 1}' if is_norm else convs[layer]}"


def timm_vit(path: str) -> str:
    """Returns timm's name of a ViT's module.

    >>> timm_vit("block_3/attention/qkv")
    'blocks.3.attn.qkv'
    """
    names = {
        "patch_embed": "patch_embed.proj",
        "position": "pos_embed",
        "registers": "reg_token",
        "attention/out": "attn.proj",
        "layer_scale1/scale": "ls1.gamma",
        "layer_scale2/scale": "ls2.gamma",
    }
    path = rename_module(path, names).replace("block_", "blocks.")
    return path.replace("attention/", "attn.").replace("/", ".")


def hf_vit(path: str) -> Names:
    """Returns Hugging Face's name of a ViT's module.

    >>> hf_vit("block_3/mlp/fc1")
    'encoder.layer.3.intermediate.dense'
    """
    path = rename_module(path, HF_VIT_NAMES).replace("block_", "encoder.layer.")
    return query_key_value(path.replace("/", "."))


def hf_dinov2(path: str) -> Names:
    """Returns Hugging Face's name of a DINOv2's module.

    >>> hf_dinov2("block_3/mlp/fc1"), hf_dinov2("block_3/layer_scale1/scale")
    ('encoder.layer.3.mlp.fc1', 'encoder.layer.3.layer_scale1.lambda1')
    """
    names = {
        "registers": "embeddings.register_tokens",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
        "layer_scale1/scale": "layer_scale1.lambda1",
        "layer_scale2/scale": "layer_scale2.lambda1",
    }
    path = rename_module(path, HF_VIT_NAMES | names).replace("block_", "encoder.layer.")
    return query_key_value(path.replace("/", "."))


def hf_bert(path: str) -> Names:
    """Returns Hugging Face's name of a module of BERT or RoBERTa.

    >>> hf_bert("layer_3/norm1")
    'encoder.layer.3.attention.output.LayerNorm'
    """
    names = {
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "type": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
        "attention/qkv": "attention.self.{}",
        "attention/out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "mlp/fc1": "intermediate.dense",
        "mlp/fc2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    return query_key_value(rename_module(path, names).replace("layer_", "encoder.layer.").replace("/", "."))


def rename_module(path: str, names: dict[str, str]) -> str:
    """Replaces a path, or what follows "block_3/" or "layer_3/" in it, by its entry in `names`, if it has one."""
    block, _, module = path.partition("/")
    if re.fullmatch(r"(block|layer)_\d+", block):
        return f"{block}/{names.get(module, module)}"
    return names.get(path, path)


def split_block(path: str) -> tuple[int, str]:
    """Splits "block_3/name" into 3 and "name"."""
    block, module = path.split("/")
    return int(block.removeprefix("block_")), module


def query_key_value(name: str) -> Names:
    """Expands `{}` in a name to the three projections of an attention that the tower has as one."""
    return tuple(name.format(part) for part in ("query", "key", "value")) if "{}" in name else name


TORCHVISION_RESNET = Layout("layer1.0.conv1.weight", torchvision_resnet)
HF_RESNET = Layout("embedder.embedder.convolution.weight", hf_resnet)
TORCHVISION_MOBILENET = Layout("features.1.conv.0.0.weight", torchvision_mobilenet)
FLAT_MOBILENET = Layout("features.1.conv.0.weight", flat_mobilenet)
EFFICIENTNET_PYTORCH = Layout("_conv_stem.weight", efficientnet_pytorch)
TIMM_VIT = Layout("patch_embed.proj.weight", timm_vit)
HF_VIT = Layout("embeddings.patch_embeddings.projection.weight", hf_vit)
HF_DINOV2 = Layout("embeddings.patch_embeddings.projection.weight", hf_dinov2)
HF_BERT = Layout("embeddings.word_embeddings.weight", hf_bert)

LEAVES = {  # name of a variable in a linen module: its name in PyTorch
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def mobilenet_layouts(blocks: Sequence[int]) -> tuple[Layout, ...]:
    """Returns the layouts of MobileNetV2 and EfficientNet-Lite; `blocks` has the number of blocks in each stage."""
    timm = Layout("conv_stem.weight", functools.partial(timm_mobilenet, blocks=blocks))
    return TORCHVISION_MOBILENET, FLAT_MOBILENET, EFFICIENTNET_PYTORCH, timm


def published_names(layout: Layout, path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names, without prefix, of the published weights that make up the variable at `path` of a tower.

    >>> published_names(TIMM_VIT, ("block_0", "norm1", "scale"))
    ('blocks.0.norm1.weight',)
    """
    *modules, leaf = path
    if leaf in LEAVES and not modules[-1].startswith("layer_scale"):
        names, end = layout.module("/".join(modules)), f".{LEAVES[leaf]}"
    else:  # a parameter that no PyTorch module owns as its weight, such as "cls_token"
        names, end = layout.module("/".join(path)), ""
    return tuple(name + end for name in ((names,) if isinstance(names, str) else names))
