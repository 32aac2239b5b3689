"""Layouts of published checkpoints: the name of each weight of a tower in torchvision, timm and Hugging Face."""

import re
from collections.abc import Callable
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


def timm_vit(path: str) -> str:
    """Returns timm's name of a ViT's module.

    >>> timm_vit("block_3/attention/qkv")
    'blocks.3.attn.qkv'
    """
    names = {"patch_embed": "patch_embed.proj", "position": "pos_embed", "attention/out": "attn.proj"}
    path = rename_module(path, names).replace("block_", "blocks.")
    return path.replace("attention/", "attn.").replace("/", ".")


def hf_vit(path: str) -> Names:
    """Returns Hugging Face's name of a ViT's module.

    >>> hf_vit("block_3/mlp/fc1")
    'encoder.layer.3.intermediate.dense'
    """
    names = {
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
    return query_key_value(rename_module(path, names).replace("block_", "encoder.layer.").replace("/", "."))


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


def query_key_value(name: str) -> Names:
    """Expands `{}` in a name to the three projections of an attention that the tower has as one."""
    return tuple(name.format(part) for part in ("query", "key", "value")) if "{}" in name else name


TORCHVISION_RESNET = Layout("layer1.0.conv1.weight", torchvision_resnet)
HF_RESNET = Layout("embedder.embedder.convolution.weight", hf_resnet)
TIMM_VIT = Layout("patch_embed.proj.weight", timm_vit)
HF_VIT = Layout("embeddings.patch_embeddings.projection.weight", hf_vit)
HF_BERT = Layout("embeddings.word_embeddings.weight", hf_bert)

LEAVES = {  # name of a variable in a linen module: its name in PyTorch
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def published_names(layout: Layout, path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names, without prefix, of the published weights that make up the variable at `path` of a tower.

    >>> published_names(TIMM_VIT, ("block_0", "norm1", "scale"))
    ('blocks.0.norm1.weight',)
    """
    *modules, leaf = path
    if leaf in LEAVES:
        names, end = layout.module("/".join(modules)), f".{LEAVES[leaf]}"
    else:  # a parameter of the tower itself, such as "cls_token"
        names, end = layout.module("/".join(path)), ""
    return tuple(name + end for name in ((names,) if isinstance(names, str) else names))
