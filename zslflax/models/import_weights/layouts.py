"""Layouts of published checkpoints: the name of each weight of a tower; here those of convolutional networks."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Names = str | tuple[str, ...]  # several names for weights that are one in the tower (query, key and value)


class Layout(NamedTuple):
    """How a family of checkpoints names its weights.

    Attributes:
        anchor: the name of a weight that each of these checkpoints has. Whatever precedes it is the prefix of all
            names in the checkpoint.
        module: maps the path of a module in the tower, such as "block_0/mlp/fc1", to its name in the checkpoint. The
            weight "kernel" of a module "fc" is "fc.weight", of "in_proj_" it is "in_proj_weight", and of "table=" it
            is "table".
        others: a regular expression of names in the same checkpoint that are of another tower.
        zeros: a regular expression of names, without prefix, that a checkpoint may lack together; they are 0 then.
    """

    anchor: str
    module: Callable[[str], Names]
    others: str = ""
    zeros: str = ""


MOBILENET_BLOCK = ("expand_conv", "expand_bn", "depthwise_conv", "depthwise_bn", "project_conv", "project_bn")


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


def timm_resnet_d(path: str) -> str:
    """Returns timm's name of a ResNet-D's module.

    >>> timm_resnet_d("layer2_0/downsample_conv"), timm_resnet_d("stem_bn2")
    ('layer2.0.downsample.1', 'conv1.4')
    """
    stem = {"stem_conv1": "0", "stem_bn1": "1", "stem_conv2": "3", "stem_bn2": "4", "conv1": "6"}
    if path in stem:
        return f"conv1.{stem[path]}"
    path = path.replace("downsample_conv", "downsample/1").replace("downsample_bn", "downsample/2")
    return torchvision_resnet(path)


def clip_resnet(path: str) -> Names:
    """Returns OpenAI's name of a module of CLIP's ResNets.

    >>> clip_resnet("conv1"), clip_resnet("layer1_0/conv1"), clip_resnet("pool/attention/qkv")
    ('conv3', 'layer1.0.conv1', ('attnpool.q_proj', 'attnpool.k_proj', 'attnpool.v_proj'))
    """
    names: dict[str, Names] = {
        "stem_conv1": "conv1",
        "stem_bn1": "bn1",
        "stem_conv2": "conv2",
        "stem_bn2": "bn2",
        "conv1": "conv3",
        "bn1": "bn3",
        "pool/position": "attnpool.positional_embedding",
        "pool/attention/qkv": ("attnpool.q_proj", "attnpool.k_proj", "attnpool.v_proj"),
    }
    return names.get(path) or torchvision_resnet(path)


def timm_convnext(path: str) -> str:
    """Returns timm's name of a ConvNeXt's module.

    >>> timm_convnext("stage2_5/mlp/fc1"), timm_convnext("stage1_norm")
    ('stages.2.blocks.5.mlp.fc1', 'stages.1.downsample.0')
    """
    block, _, module = path.partition("/")
    if not module:
        stems = {"norm": "head.norm", "stage0_conv": "stem.0", "stage0_norm": "stem.1"}
        stage, _, kind = block.removeprefix("stage").partition("_")
        return stems.get(path, f"stages.{stage}.downsample.{0 if kind == 'norm' else 1}")
    stage, index = block.removeprefix("stage").split("_")
    names = {"depthwise": "conv_dw", "layer_scale/scale": "gamma"}
    return f"stages.{stage}.blocks.{index}.{names.get(module, module.replace('/', '.'))}"


def hf_convnext(path: str) -> str:
    """Returns Hugging Face's name of a ConvNeXt's module.

    >>> hf_convnext("stage2_5/mlp/fc1"), hf_convnext("stage1_norm")
    ('encoder.stages.2.layers.5.pwconv1', 'encoder.stages.1.downsampling_layer.0')
    """
    block, _, module = path.partition("/")
    if not module:
        stems = {
            "norm": "layernorm",
            "stage0_conv": "embeddings.patch_embeddings",
            "stage0_norm": "embeddings.layernorm",
        }
        stage, _, kind = block.removeprefix("stage").partition("_")
        return stems.get(path, f"encoder.stages.{stage}.downsampling_layer.{0 if kind == 'norm' else 1}")
    stage, index = block.removeprefix("stage").split("_")
    names = {
        "depthwise": "dwconv",
        "norm": "layernorm",
        "mlp/fc1": "pwconv1",
        "mlp/fc2": "pwconv2",
        "layer_scale/scale": "layer_scale_parameter",
    }
    return f"encoder.stages.{stage}.layers.{index}.{names[module]}"


BRANCHES = {  # the modules of FastViT's `Branches`, and timm's names
    "conv": "conv_kxk.0.conv",
    "conv_bn": "conv_kxk.0.bn",
    "small_conv": "conv_scale.conv",
    "small_bn": "conv_scale.bn",
    "skip_bn": "identity",
}
FASTVIT_BLOCK = {
    **{f"mixer/{module}": f"token_mixer.mixer.{name}" for module, name in BRANCHES.items()},
    "mixer_bn": "token_mixer.norm.identity",
    "layer_scale_mixer/scale": "token_mixer.layer_scale.gamma",
    "attention/qkv": "token_mixer.qkv",
    "out": "token_mixer.proj",
    "mlp/conv": "mlp.conv.conv",
    "mlp/conv_bn": "mlp.conv.bn",
    "layer_scale/scale": "layer_scale.gamma",
    "layer_scale1/scale": "layer_scale_1.gamma",
    "layer_scale2/scale": "layer_scale_2.gamma",
}


def timm_fastvit(path: str) -> str:
    """Returns timm's name of a FastViT's module.

    >>> timm_fastvit("stage2_5/mixer/small_conv"), timm_fastvit("stage1_large/conv_bn")
    ('stages.2.blocks.5.token_mixer.mixer.conv_scale.conv', 'stages.1.downsample.proj.0.large_conv.bn')
    """
    owner, _, module = path.partition("/")
    if owner.startswith("stem"):
        return f"stem.{owner[4:]}.{BRANCHES[module]}"
    if owner == "last":
        return f"final_conv.{BRANCHES[module]}"
    if owner == "last_squeeze":
        return f"final_conv.se.{module}"
    stage, _, part = owner.removeprefix("stage").partition("_")
    stage = f"stages.{stage}"
    if part == "large":
        kernel, kind = "small" if module.startswith("small") else "large", "bn" if module.endswith("bn") else "conv"
        return f"{stage}.downsample.proj.0.{kernel}_conv.{kind}"
    if part == "squeeze":
        return f"{stage}.downsample.proj.0.se.{module}"
    if part == "point":
        return f"{stage}.downsample.proj.1.{BRANCHES[module]}"
    if part == "position":
        return f"{stage}.pos_emb.pos_enc"
    return f"{stage}.blocks.{part}.{FASTVIT_BLOCK.get(module, module.replace('/', '.'))}"


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


def rename_module(path: str, names: Mapping[str, str]) -> str:
    """Replaces a path, or what follows "block_3/" or "layer_3/" in it, by its entry in `names`, if it has one."""
    block, _, module = path.partition("/")
    if re.fullmatch(r"(block|layer)_\d+", block):
        return f"{block}/{names.get(module, module)}"
    return names.get(path, path)


def expand(name: str, parts: Sequence[str] = ("query", "key", "value")) -> Names:
    """Expands `{}` in a name to the three projections of an attention that the tower has as one."""
    return tuple(name.format(part) for part in parts) if "{}" in name else name


def split_block(path: str) -> tuple[int, str]:
    """Splits "block_3/name" into 3 and "name"."""
    block, module = path.split("/")
    return int(block.removeprefix("block_")), module


TORCHVISION_RESNET = Layout("layer1.0.conv1.weight", torchvision_resnet)
HF_RESNET = Layout("embedder.embedder.convolution.weight", hf_resnet)
TIMM_RESNET_D = Layout("conv1.0.weight", timm_resnet_d)
# What models of open_clip have beside their image tower: sizes, which OpenAI's own files have beside the weights, the
# scale and the bias, what writes captions in a CoCa, and the text tower.
OPEN_CLIP_SHARED = r"logit_(scale|bias)|(text\.)?attn_mask|input_resolution|context_length|vocab_size|text_decoder\..+"
OPEN_CLIP_TEXT_TOWER = r"text\..+|transformer\..+|(positional|token)_embedding.*|ln_final\..+|text_projection.*"
# Beside a tower of timm, the projection as well.
BESIDE_TRUNK = rf"visual\.head\..+|{OPEN_CLIP_TEXT_TOWER}|{OPEN_CLIP_SHARED}"
TIMM_CONVNEXT = Layout("stem.0.weight", timm_convnext, BESIDE_TRUNK)
TIMM_FASTVIT = Layout("stem.0.conv_kxk.0.conv.weight", timm_fastvit, BESIDE_TRUNK)
HF_CONVNEXT = Layout("encoder.stages.0.layers.0.dwconv.weight", hf_convnext)
TORCHVISION_MOBILENET = Layout("features.1.conv.0.0.weight", torchvision_mobilenet)
FLAT_MOBILENET = Layout("features.1.conv.0.weight", flat_mobilenet)
EFFICIENTNET_PYTORCH = Layout("_conv_stem.weight", efficientnet_pytorch)

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

    >>> published_names(TORCHVISION_RESNET, ("layer1_0", "bn1", "scale"))
    ('layer1.0.bn1.weight',)
    """
    *modules, leaf = path
    if leaf in LEAVES and not modules[-1].startswith("layer_scale"):
        names, end = layout.module("/".join(modules)), LEAVES[leaf]
    else:  # a parameter that no PyTorch module owns as its weight, such as "cls_token"
        names, end = layout.module("/".join(path)), ""
    return tuple(join_name(name, end) for name in ((names,) if isinstance(names, str) else names))


def join_name(module: str, leaf: str) -> str:
    """Returns the name of a weight from that of its module, as `Layout.module` gives it."""
    if not leaf or module.endswith("="):
        return module.removesuffix("=")
    return module + leaf if module.endswith("_") else f"{module}.{leaf}"
