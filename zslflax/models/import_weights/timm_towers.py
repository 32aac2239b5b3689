"""Image towers that open_clip takes from timm: their names there, in Hugging Face's terms."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zslflax.errors import UserError

VIT_NAME = re.compile(r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)_((?P<kind>siglip|clip)_)?(?P<image>\d+)")
VIT_SIZES = {  # width, depth, heads, width inside the perceptrons
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
}
SIGLIP_SIZES = {
    "base": VIT_SIZES["base"],
    "large": VIT_SIZES["large"],
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
EVA_NAME = re.compile(
    r"(?P<family>eva02|eva|vit_pe_core)_(?P<size>[a-z]+)_patch(?P<patch>\d+)_(?:clip_)?(?P<image>\d+)"
)
EVA_SIZES = {  # by family; EVA02-E has the layer norms of its blocks elsewhere
    "eva": {"giant": (1408, 40, 16, 6144)},
    "eva02": {"base": (768, 12, 12, 2048), "large": (1024, 24, 16, 2730)},
    "vit_pe_core": {
        **{size: VIT_SIZES[size] for size in ("tiny", "small", "base", "large")},
        "gigantic": (1536, 50, 16, 8960),
    },
}
# SigLIPs with the approximate GELU, as they were trained; timm gives the others the exact one.
TANH = re.compile(r"vit_(base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt_patch16).*")
# The ways to pool, by the value of timm_pool; "" is timm's default of the tower.
VIT_POOLS = {"": "cls", "token": "cls", "avg": "mean"}
SIGLIP_POOLS = {"map": "map"}
EVA_POOLS = {"eva": {"token": "cls"}, "eva02": {"token": "cls"}, "vit_pe_core": {"map": "cls_map"}}
CONVNEXT_POOLS = {"": "avg", "avg": "avg"}
FASTVIT_POOLS = {"avg": "avg"}


def timm_fields(path: Path, image: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns vision_config of a tower that timm names, and the kind of projection after it.

    The model_types timm_vit, timm_clip, timm_eva, timm_eva02, timm_pe, timm_convnext and timm_fastvit are of this
    project, and the field rope_grid: the patches along a side of the image for which a patch's number is its rotary
    position.

    Args:
        path: of open_clip_config.json, for messages.
        image: its vision_cfg.

    Raises:
        UserError: the tower, its pooling or its projection is not implemented.
    """
    # They import JAX, which the processes that prepare data do without.
    from zslflax.models.convnext import CONVNEXTS
    from zslflax.models.fastvit import FASTVITS

    name, pool = image["timm_model_name"].partition(".")[0], image.get("timm_pool", "avg")
    projection = image.get("timm_proj", "linear")
    match = VIT_NAME.fullmatch(name)
    siglip, eva = bool(match and match["kind"] == "siglip"), EVA_NAME.fullmatch(name)
    projections: tuple[str | None, ...] = ("none", "linear", "mlp") if siglip else ("linear", "mlp")
    if match and pool == "token":  # with another pool, timm's classifier has a norm of its own, or is for each token
        projections = (None, *projections)
    if name in CONVNEXTS:
        pools, fields = CONVNEXT_POOLS, convnext_fields(*CONVNEXTS[name])
    elif name in FASTVITS:
        pools, projections = FASTVIT_POOLS, (None,)
        fields = {"model_type": "timm_fastvit", "name": name}
    elif match and match["size"] in (SIGLIP_SIZES if siglip else VIT_SIZES):
        pools, fields = (SIGLIP_POOLS, siglip_fields(match)) if siglip else (VIT_POOLS, vit_fields(match))
    elif eva and eva["size"] in EVA_SIZES[eva["family"]]:
        pools, fields, projections = EVA_POOLS[eva["family"]], eva_fields(eva), (None,)
    else:
        raise UserError(
            f"{path} has vision_cfg.timm_model_name {name!r}, which is not implemented; expected a ViT such as "
            "vit_base_patch16_224 or vit_base_patch16_clip_224, a SigLIP such as vit_base_patch16_siglip_224, "
            "eva02_base_patch16_clip_224 or _large_, a PE-Core such as vit_pe_core_base_patch16_224, or "
            f"{', '.join([*CONVNEXTS, *FASTVITS])}"
        )
    if pool not in pools or projection not in projections:
        wanted = "no projection (null)" if projections == (None,) else "a projection linear or mlp"
        raise UserError(
            f"{path} has timm_pool {pool!r} and timm_proj {projection!r}, which is not implemented for {name}; "
            f"expected the pool {' or '.join(map(repr, pools))} and {wanted}"
        )
    if projection is None:  # timm's classifier, which has a bias
        projection = "linear"
    elif projection == "linear" and not image.get("timm_proj_bias"):
        projection = "linear_no_bias"
    pooling = pools[pool] if fields.get("class_token", True) else pools[pool].removeprefix("cls_")
    return fields | {"pooling": pooling, "image_size": image.get("image_size", 224)}, projection


def vit_fields(match: re.Match[str]) -> dict[str, Any]:
    """Returns the fields of a ViT of timm, or of CLIP's in timm, from its name."""
    kind = match["kind"] or "vit"
    eps = {"layer_norm_eps": 1e-5} if kind == "clip" else {}
    return {"model_type": f"timm_{kind}", "hidden_act": "gelu"} | transformer_fields(match, VIT_SIZES) | eps


def siglip_fields(match: re.Match[str]) -> dict[str, Any]:
    """Returns the fields of SigLIP's ViT in timm from its name."""
    act = "gelu_pytorch_tanh" if TANH.fullmatch(match[0]) else "gelu"
    return {"model_type": "siglip_vision_model", "hidden_act": act} | transformer_fields(match, SIGLIP_SIZES)


def eva_fields(match: re.Match[str]) -> dict[str, Any]:
    """Returns the fields of a tower of timm's class Eva from its name."""
    family = match["family"]
    own: dict[str, dict[str, Any]] = {
        "eva": {"model_type": "timm_eva", "hidden_act": "gelu"},
        "eva02": {"model_type": "timm_eva02", "rope_grid": 16},
        "vit_pe_core": {
            "model_type": "timm_pe",
            "hidden_act": "gelu",
            "rope_grid": int(match["image"]) // int(match["patch"]),
            "class_token": match["size"] != "gigantic",
        },
    }
    eps = {"layer_norm_eps": 1e-5} if family == "vit_pe_core" else {}
    return own[family] | transformer_fields(match, EVA_SIZES[family]) | eps


def transformer_fields(match: re.Match[str], sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the sizes of a ViT from its name, with a table of those that each name stands for."""
    width, depth, heads, hidden = sizes[match["size"]]
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "patch_size": int(match["patch"]),
        "layer_norm_eps": 1e-6,
    }


def convnext_fields(depths: tuple[int, ...], widths: tuple[int, ...], eps: float) -> dict[str, Any]:
    """Returns the fields of a ConvNeXt from its blocks and channels in each stage and the epsilon of its norms."""
    sizes = {"depths": list(depths), "hidden_sizes": list(widths)}
    return {"model_type": "timm_convnext", "layer_norm_eps": eps} | sizes
