"""Models as open_clip publishes them: open_clip_config.json in Hugging Face's terms.

Hugging Face has no such pairs of towers. The model_type is "open_clip", each tower has its own model_type, and these
fields are of this project: resnet_layers (the blocks in each stage) and resnet_width (the channels after the stem) of
CLIP's ResNets; pre_norm, pool, pool_size, mean_first and layer_scale of its ViTs, as in `ViT`; causal, class_token and
zero_padding of its text tower, as in `BertConfig`; pooling of a text encoder, context_length, image_projection,
text_projection, projection_hidden and logit_bias.
"""

from pathlib import Path
from typing import Any

from zslflax.errors import UserError
from zslflax.files import read_json
from zslflax.models.import_weights.text_encoders import read_encoder_config
from zslflax.models.import_weights.timm_towers import timm_fields

Values = dict[str, Any]

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
MODEL_FIELDS = {
    *("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
}
VIT_FIELDS = {
    *("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"),
    *("no_ln_pre", "pool_type", "final_ln_after_pool", "ls_init_value", "output_tokens"),
    *("attentional_pool", "attn_pooler_heads", "attn_pooler_queries"),
}
TIMM_FIELDS = VIT_FIELDS | {
    *("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
    *("timm_drop", "timm_drop_path"),
}
TOKEN_FIELDS = {"context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs"}
TEXT_FIELDS = TOKEN_FIELDS | {
    *("width", "heads", "layers", "mlp_ratio", "no_causal_mask", "pool_type", "pad_id", "eos_id"),
    *("proj_type", "proj_bias", "norm_kwargs", "act_kwargs", "embed_cls", "output_tokens"),
}
HF_FIELDS = TOKEN_FIELDS | {
    *("width", "heads", "layers", "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    "output_tokens",
}
VIT_POOLERS = {"tok": "cls", "avg": "mean"}
HF_POOLERS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls"}
HF_TYPES = ("bert", "roberta", "xlm-roberta")
CLEANINGS = ("whitespace", "lower", "canonicalize")


def is_open_clip(folder: Path) -> bool:
    """Whether a folder's model is described by open_clip_config.json, not by a config.json of Hugging Face."""
    path = folder / "config.json"
    described = path.is_file() and "model_type" in read_json(path)
    return not described and (folder / OPEN_CLIP_CONFIG).is_file()


def tokenizer_options(folder: Path) -> Values:
    """Returns what open_clip does before and after a tokenizer of Hugging Face.

    Returns:
        "clean", how it cleans texts, one of `CLEANINGS`, and "strip_sep_token", whether token 0 replaces the one at the
        end of a text. Empty where the folder is not open_clip's, or has CLIP's own tokenizer, which needs neither.
    """
    text = read_json(folder / OPEN_CLIP_CONFIG)["model_cfg"]["text_cfg"] if is_open_clip(folder) else {}
    if not text.get("hf_tokenizer_name"):
        return {}
    return {"clean": "whitespace", "strip_sep_token": False} | (text.get("tokenizer_kwargs") or {})


def to_hugging_face(path: Path) -> Values:
    """Reads open_clip_config.json as the config.json that Hugging Face would have of each tower.

    Raises:
        UserError: the model has a tower or an option that is not implemented.
    """
    model = read_json(path)["model_cfg"]
    image, text = model["vision_cfg"], model["text_cfg"]
    check_options(path, model)
    width, activation = model["embed_dim"], "quick_gelu" if model.get("quick_gelu") else "gelu"
    hidden = {}
    if image.get("timm_model_name"):
        vision_config, image_projection = timm_fields(path, image)
        hidden["image"] = 2 * width
    elif isinstance(image.get("layers"), list):
        vision_config, image_projection = resnet_fields(image), "linear"
    else:
        vision_config, image_projection = vit_fields(path, image, activation, width), "linear_no_bias"
    if text.get("hf_model_name"):
        text_config, text_projection = hf_text_fields(path, text)
        hidden["text"] = (text_config["hidden_size"] + width) // 2
    else:
        text_config, text_projection = text_fields(path, text, activation)
    kinds = {"image": image_projection, "text": text_projection}
    widths = {hidden[modality] for modality, kind in kinds.items() if kind == "mlp"}
    if len(widths) > 1:
        raise UserError(f"{path} has projections of {widths} hidden channels; only equal numbers are implemented")
    return {
        "model_type": "open_clip",
        "projection_dim": width,
        "image_projection": image_projection,
        "text_projection": text_projection,
        "projection_hidden": widths.pop() if widths else 0,
        "logit_bias": model.get("init_logit_bias") is not None,
        "vision_config": vision_config,
        "text_config": text_config,
    }


def check_options(path: Path, model: Values) -> None:
    """Refuses options of model_cfg that are not implemented, unless they are switched off."""
    image, text = model["vision_cfg"], model["text_cfg"]
    # Where padding is no part of a text, the token at its end would not be part of it either without its id.
    tokenizer_fields = {"clean", "strip_sep_token"} if text.get("no_causal_mask") else {"clean"}
    sections = (
        ("", model, MODEL_FIELDS),
        ("vision_cfg.", image, TIMM_FIELDS if image.get("timm_model_name") else VIT_FIELDS),
        ("text_cfg.", text, HF_FIELDS if text.get("hf_model_name") else TEXT_FIELDS),
        ("text_cfg.tokenizer_kwargs.", text.get("tokenizer_kwargs") or {}, tokenizer_fields),
        ("text_cfg.norm_kwargs.", text.get("norm_kwargs") or {}, {"eps"}),
        ("text_cfg.act_kwargs.", text.get("act_kwargs") or {}, {"approximate"}),
    )
    unknown = [
        prefix + field
        for prefix, section, known in sections
        for field in sorted(section.keys() - known)
        if section[field] not in (None, False)
    ]
    if unknown:
        raise UserError(f"{path} has {', '.join(unknown)}, which is not implemented")
    refuse_others(path, text, "hf_pooler_type", *HF_POOLERS, default="mean_pooler")
    refuse_others(path, text.get("tokenizer_kwargs") or {}, "clean", *CLEANINGS, default="whitespace")
    refuse_others(path, text.get("act_kwargs") or {}, "approximate", "tanh", "none", default="none")


def refuse_others(path: Path, section: Values, field: str, *choices: Any, default: Any) -> Any:
    """Returns the value of a field, or the default; refuses values other than the choices."""
    value = section.get(field, default)
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise UserError(f"{path} has {field} {value!r}, which is not implemented; expected {expected}")
    return value


def vit_fields(path: Path, image: Values, activation: str, embed_dim: int) -> Values:
    """Returns vision_config of CLIP's ViT from open_clip's vision_cfg."""
    queries = refuse_others(path, image, "attentional_pool", True, False, None, default=False)  # CoCa's pool
    pool = refuse_others(path, image, "pool_type", *(("tok",) if queries else VIT_POOLERS), default="tok")
    width = image.get("width", 768)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": image.get("layers", 12),
        "num_attention_heads": width // image.get("head_width", 64),
        "intermediate_size": int(width * image.get("mlp_ratio", 4)),
        "image_size": image.get("image_size", 224),
        "patch_size": image["patch_size"],
        "hidden_act": activation,
        "pre_norm": not image.get("no_ln_pre"),
        "pool": "query" if queries else VIT_POOLERS[pool],
        "pool_size": (image.get("attn_pooler_heads", 8), embed_dim) if queries else (),
        "mean_first": bool(image.get("final_ln_after_pool")),
        "layer_scale": image.get("ls_init_value") is not None,
    }


def resnet_fields(image: Values) -> Values:
    """Returns vision_config of CLIP's ResNet likewise.

    >>> resnet_fields({"layers": [3, 4, 6, 3], "width": 64, "image_size": 224})["num_attention_heads"]
    32
    """
    return {
        "model_type": "clip_vision_model",
        "resnet_layers": image["layers"],
        "resnet_width": image["width"],
        "num_attention_heads": 32 * image["width"] // image.get("head_width", 64),
        "image_size": image.get("image_size", 224),
    }


def text_fields(path: Path, text: Values, activation: str) -> tuple[Values, str]:
    """Returns text_config of CLIP's or SigLIP's text tower from open_clip's text_cfg, and the projection after it."""
    both_ways = bool(text.get("no_causal_mask"))
    siglip = both_ways and bool(text.get("hf_tokenizer_name"))  # without, token 0 fills up texts
    # CLIP takes the vector of the end token, SigLIP the last one of a text that is padded to its maximal length.
    pools = ("last",) if siglip else ("argmax",) if both_ways else ("argmax", "eos")
    class_token = bool(text.get("embed_cls"))
    if class_token:  # of CoCa, which pools by it
        for field, default in (("no_causal_mask", False), ("hf_tokenizer_name", None), ("pad_id", 0)):
            refuse_others(path, text, field, default, default=default)
    else:
        refuse_others(path, text, "pool_type", *pools, default="argmax")
    if (text.get("act_kwargs") or {}).get("approximate") == "tanh":
        activation = "gelu_pytorch_tanh"
    kind = refuse_others(path, text, "proj_type", "linear", "none", default="linear")
    width = text.get("width", 512)
    fields = {
        "model_type": "siglip_text_model" if siglip else "clip_text_model",
        "causal": not both_ways,
        "zero_padding": both_ways and not siglip,
        "vocab_size": text.get("vocab_size", 49_408),
        "hidden_size": width,
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "intermediate_size": int(width * text.get("mlp_ratio", 4)),
        "max_position_embeddings": text.get("context_length", 77) + int(class_token),
        "context_length": text.get("context_length", 77),
        "class_token": class_token,
        "hidden_act": activation,
        "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    return fields, "linear_no_bias" if kind == "linear" and not text.get("proj_bias") else kind


def hf_text_fields(path: Path, text: Values) -> tuple[Values, str]:
    """Returns text_config of a text encoder that open_clip takes from Hugging Face, and the projection after it."""
    config = read_encoder_config(path.parent, text["hf_model_name"])
    if config.get("model_type") not in HF_TYPES:
        raise UserError(
            f"{path} has hf_model_name {text['hf_model_name']!r} of model_type {config.get('model_type')!r}, which is "
            f"not implemented; expected {', '.join(HF_TYPES)}"
        )
    kind = refuse_others(path, text, "hf_proj_type", "linear", "mlp", None, default="mlp")
    pooling = HF_POOLERS[text.get("hf_pooler_type", "mean_pooler")]
    own = {"pooling": pooling, "context_length": text.get("context_length", 77)}
    return config | own, {"linear": "linear_no_bias", None: "none"}.get(kind, kind)
