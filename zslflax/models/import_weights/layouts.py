"""How PyTorch checkpoints name the weights that the towers have."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Layout(NamedTuple):
    """How a family of checkpoints names its weights.

    Attributes:
        anchor: a name that each has; what comes before it is the checkpoint's prefix.
        module: from a module's path in the tower, such as "block_0/mlp/fc1", to its name there; a tuple of
            names for weights that are one in the tower (query, key and value).
    """

    anchor: str
    module: Callable[[str], str | tuple[str, ...]]


def torchvision_resnet(path: str) -> str:
    path = re.sub(r"layer(\d+)_(\d+)/", r"layer\1/\2/", path)
    return path.replace("downsample_conv", "downsample/0").replace("downsample_bn", "downsample/1").replace("/", ".")


def hf_resnet(path: str) -> str:
    *block, module = path.split("/")
    kind = "convolution" if "conv" in module else "normalization"
    if not block:
        return f"embedder.embedder.{kind}"
    stage, index = re.fullmatch(r"layer(\d+)_(\d+)", block[0]).groups()
    part = "shortcut" if module.startswith("downsample") else f"layer.{int(module[-1]) - 1}"
    return f"encoder.stages.{int(stage) - 1}.layers.{index}.{part}.{kind}"


def timm_vit(path: str) -> str:
    names = {"patch_embed": "patch_embed.proj", "position": "pos_embed", "attention/out": "attn.proj"}
    return renamed(path, names).replace("block_", "blocks.").replace("attention/", "attn.").replace("/", ".")


def hf_vit(path: str) -> str | tuple[str, ...]:
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
    return query_key_value(renamed(path, names).replace("block_", "encoder.layer.").replace("/", "."))


def hf_bert(path: str) -> str | tuple[str, ...]:
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
    return query_key_value(renamed(path, names).replace("layer_", "encoder.layer.").replace("/", "."))


def renamed(path: str, names: dict[str, str]) -> str:
    """`path` with the part after the block's number looked up in `names`."""
    block, name = re.fullmatch(r"((?:block|layer)_\d+/)?(.*)", path).groups()
    return (block or "") + names.get(name, name)


def query_key_value(name: str) -> str | tuple[str, ...]:
    return tuple(name.format(part) for part in ("query", "key", "value")) if "{}" in name else name


TORCHVISION_RESNET = Layout("layer1.0.conv1.weight", torchvision_resnet)
HF_RESNET = Layout("embedder.embedder.convolution.weight", hf_resnet)
TIMM_VIT = Layout("patch_embed.proj.weight", timm_vit)
HF_VIT = Layout("embeddings.patch_embeddings.projection.weight", hf_vit)
HF_BERT = Layout("embeddings.word_embeddings.weight", hf_bert)

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def source_names(layout: Layout, path: tuple[str, ...]) -> tuple[str, ...]:
    """The checkpoint's names, without prefix, of the weights that make up the tower's value at `path`."""
    *modules, leaf = path
    if leaf not in LEAVES:  # a parameter of the tower itself
        return (layout.module("/".join(path)),)
    names = layout.module("/".join(modules))
    return tuple(f"{name}.{LEAVES[leaf]}" for name in ((names,) if isinstance(names, str) else names))
