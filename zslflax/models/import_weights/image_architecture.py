"""What config.json says of a published image tower without a name: its sizes, and how it differs from others."""

from collections.abc import Callable

from zslflax.errors import UserError
from zslflax.models.fastvit import FASTVITS
from zslflax.models.import_weights.architecture import (
    MAX_LAYERS,
    Values,
    activation,
    expect_options,
    pick,
    tower_values,
)
from zslflax.models.vit import Rotary

VIT_SIZES = {
    "patch": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}
CONVNEXT_SIZES = {"depths": "depths", "widths": "hidden_sizes", "eps": "layer_norm_eps"}
CLIP_RESNET_SIZES = {"stages": "resnet_layers", "stem_width": "resnet_width", "heads": "num_attention_heads"}
CLIP_IMAGE_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Fields of CLIP's `ViT`, and their values in Hugging Face's files; those of open_clip may have others.
CLIP_VIT = {"pre_norm": True, "pool": "cls", "pool_size": (), "mean_first": False, "layer_scale": False}
SIGLIP_IMAGE_DEFAULTS = CLIP_IMAGE_DEFAULTS | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}


def vit_architecture(values: Values) -> Values | None:
    """Returns the fields of the `ViT` that a file of CLIP, SigLIP or open_clip describes; None for another tower.

    Raises:
        UserError: one of its options is not implemented.
    """
    values = tower_values(values, "vision")
    own: Values
    if values.get("model_type") == "clip_vision_model" and "resnet_layers" not in values:
        values = CLIP_IMAGE_DEFAULTS | values
        own = {field: values.get(field, default) for field, default in CLIP_VIT.items()}
        own |= {"patch_bias": False, "pool_size": tuple(own["pool_size"])}
    elif values.get("model_type") == "siglip_vision_model":
        values = {**SIGLIP_IMAGE_DEFAULTS, **values}
        expect_options(values, {"vision_use_head": True})
        # So400m/14 leaves 6 of its 384 pixels out. Only there, so that another size is still refused in a config.
        own = {"class_token": False, "pool": "map", "cut": values["image_size"] % values["patch_size"] > 0}
    elif values.get("model_type") in TIMM_VITS:
        own = TIMM_VITS[values["model_type"]](values) | {"pool": values["pooling"]}
    else:
        return None
    expect_options(values, {"num_channels": 3})
    act = own.get("activation") or activation(values)
    return pick(values, VIT_SIZES) | own | {"activation": act, "eps": values["layer_norm_eps"]}


def eva02(values: Values) -> Values:
    """Fields of EVA-02's `ViT` (Fang et al. 2023, arXiv 2303.11331) as EVA-02-CLIP has it (arXiv 2303.15389)."""
    own = {"activation": "silu", "gated": True, "key_bias": False, "inner_norm": True}
    return own | {"rotary": Rotary(span=float(values["rope_grid"]))}


def perception_encoder(values: Values) -> Values:
    """Fields of PE-Core's `ViT` (Bolya et al. 2025, arXiv 2504.13181)."""
    own = {"patch_bias": False, "pre_norm": True, "class_token": values["class_token"]}
    rotary = Rotary(span=float(values["rope_grid"]), anchor=1.0)
    return own | {"rotary": rotary, "pool_size": (8, 4 * values["hidden_size"])}


TIMM_VITS: dict[str, Callable[[Values], Values]] = {  # by model_type, the fields in which a `ViT` differs from ViT
    "timm_vit": lambda values: {},
    "timm_clip": lambda values: {"patch_bias": False, "pre_norm": True},
    "timm_eva": lambda values: {"key_bias": False},
    "timm_eva02": eva02,
    "timm_pe": perception_encoder,
}


def clip_resnet_architecture(values: Values) -> Values | None:
    """Returns the fields of the `ResNet` that a config.json of CLIP describes; None for another tower.

    Raises:
        UserError: its sizes cannot be those of a ResNet.
    """
    values = tower_values(values, "vision")
    if values.get("model_type") != "clip_vision_model" or "resnet_layers" not in values:
        return None
    sizes = pick(values, CLIP_RESNET_SIZES)
    stages, width, heads = sizes.values()
    whole = isinstance(stages, list) and all(type(size) is int and size > 0 for size in [*stages, width, heads])
    if not whole or len(stages) != 4 or sum(stages) > MAX_LAYERS or 32 * width % heads:
        raise UserError(
            f"the ResNet has layers {stages}, width {width} and {heads} heads; expected four numbers of layers, of "
            f"{MAX_LAYERS} at most, and a number of heads that divides 32 · width"
        )
    return {"stages": tuple(stages), "bottleneck": True, "stem_width": width, "deep": True, "heads": heads}


def convnext_architecture(values: Values) -> Values | None:
    """Returns the fields of the `ConvNeXt` that the file of an open_clip model describes; None for another tower.

    Raises:
        UserError: its sizes cannot be those of a ConvNeXt.
    """
    values = tower_values(values, "vision")
    if values.get("model_type") != "timm_convnext":
        return None
    sizes = pick(values, CONVNEXT_SIZES)
    depths, widths = sizes["depths"], sizes["widths"]
    whole = all(isinstance(x, list) and all(type(n) is int and n > 0 for n in x) for x in (depths, widths))
    if not whole or len(depths) != len(widths) or sum(depths) > MAX_LAYERS:
        raise UserError(
            f"the ConvNeXt has {depths} blocks of {widths} channels; expected whole numbers for the same stages, and "
            f"{MAX_LAYERS} blocks at most"
        )
    return sizes | {"depths": tuple(depths), "widths": tuple(widths)}


def fastvit_architecture(values: Values) -> Values | None:
    """Returns the fields of the `FastViT` that the file of an open_clip model names; None for another tower."""
    values = tower_values(values, "vision")
    return {"variant": FASTVITS[values["name"]]} if values.get("model_type") == "timm_fastvit" else None


def image_architecture(values: Values) -> Values | None:
    """Returns the fields of the image tower that a config.json describes; None where it has to be named."""
    architectures = vit_architecture, clip_resnet_architecture, convnext_architecture, fastvit_architecture
    return next((fields for fields in (architecture(values) for architecture in architectures) if fields), None)
