"""Models as open_clip publishes them: open_clip_config.json in Hugging Face's terms."""

from pathlib import Path
from typing import Any

from zslflax.errors import UserError
from zslflax.files import read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
IMAGE_FIELDS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"}


def to_hugging_face(path: Path) -> dict[str, Any]:
    """Reads open_clip_config.json of a CLIP as the config.json that Hugging Face's CLIP has.

    Hugging Face has no CLIP with a ResNet: the fields resnet_layers, the blocks in each stage, and resnet_width, the
    channels after the stem, are of this project.

    Raises:
        UserError: the model has other towers, or an option that is not implemented.
    """
    model = read_json(path)["model_cfg"]
    image, text = model["vision_cfg"], model["text_cfg"]
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
    unknown = [*sorted(model.keys() - known)]
    unknown += [f"vision_cfg.{field}" for field in sorted(image.keys() - IMAGE_FIELDS)]
    unknown += [f"text_cfg.{field}" for field in sorted(text.keys() - TEXT_FIELDS)]
    if unknown:
        raise UserError(f"{path} has {', '.join(unknown)}, which is not implemented; only CLIP's own towers are")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    is_resnet = isinstance(image.get("layers"), list)
    return {
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "vision_config": resnet_fields(image) if is_resnet else vit_fields(image, activation),
        "text_config": {
            "vocab_size": text.get("vocab_size", 49_408),
            "hidden_size": text.get("width", 512),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "intermediate_size": int(text.get("width", 512) * text.get("mlp_ratio", 4)),
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_act": activation,
        },
    }


def vit_fields(image: dict[str, Any], activation: str) -> dict[str, Any]:
    """Returns vision_config of a ViT from open_clip's vision_cfg."""
    width = image.get("width", 768)
    return {
        "hidden_size": width,
        "num_hidden_layers": image.get("layers", 12),
        "num_attention_heads": width // image.get("head_width", 64),
        "intermediate_size": int(width * image.get("mlp_ratio", 4)),
        "image_size": image.get("image_size", 224),
        "patch_size": image["patch_size"],
        "hidden_act": activation,
    }


def resnet_fields(image: dict[str, Any]) -> dict[str, Any]:
    """Returns vision_config of a ResNet likewise.

    >>> resnet_fields({"layers": [3, 4, 6, 3], "width": 64, "image_size": 224})["num_attention_heads"]
    32
    """
    return {
        "resnet_layers": image["layers"],
        "resnet_width": image["width"],
        "num_attention_heads": 32 * image["width"] // image.get("head_width", 64),
        "image_size": image.get("image_size", 224),
    }
