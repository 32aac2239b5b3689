"""What config.json says of a published encoder: its kind, its sizes, and how it differs from others of its family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zslflax.errors import MissingFileError, UserError, nearest_names
from zslflax.files import read_json
from zslflax.models.bert import BertConfig
from zslflax.models.import_weights.open_clip import OPEN_CLIP_CONFIG, is_open_clip, to_hugging_face

Values = dict[str, Any]

ROBERTAS = ("roberta", "xlm-roberta", "camembert")  # values of Hugging Face's model_type for one architecture
MAX_LAYERS = 1024  # a file that says more is refused where it is used
TWO_TOWERS = ("clip", "siglip", "open_clip")  # values of model_type of models with a text_config and a vision_config
BERT_SIZES = {  # field of BertConfig: field of a Hugging Face config.json
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
}
DISTILBERT_SIZES = BERT_SIZES | {"width": "dim", "layers": "n_layers", "heads": "n_heads", "hidden": "hidden_dim"}
# What Hugging Face's classes take where a config.json is silent, as those of CLIP and SigLIP often are.
CLIP_TEXT_DEFAULTS = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP_TEXT_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def read_architecture(folder: Path) -> Values:
    """Reads a folder's config.json in Hugging Face's terms, or the open_clip_config.json that stands for it.

    Raises:
        MissingFileError: the folder has neither.
        UserError: the model of open_clip has an option that is not implemented, or its file is damaged.
    """
    if is_open_clip(folder):
        path = folder / OPEN_CLIP_CONFIG
        try:
            return to_hugging_face(path)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} lacks a field or has one of the wrong type: {error!r}") from error
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{folder} has no config.json, which says how large the model is")
    return read_json(path)


def tower_values(values: Values, modality: str) -> Values:
    """Returns the part of a config.json that describes the "text" or the "vision" tower of a two-tower model.

    The values of one tower are returned as they are. Older files have the section text_config_dict as well, which
    transformers takes instead of text_config, with defaults for the fields that it lacks.
    """
    if values.get("model_type") not in TWO_TOWERS:
        return values
    section = values.get(f"{modality}_config_dict") or values.get(f"{modality}_config") or {}
    if values["model_type"] == "open_clip":  # whose towers have types of their own
        return section
    return {**section, "model_type": f"{values['model_type']}_{modality}_model"}


def expect_options(values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses options of a config.json with which its encoder computes otherwise than the towers here.

    Args:
        values: of config.json; a field that it lacks has the expected value.
        expected: by field, the only value that is implemented.
    """
    for field, wanted in expected.items():
        if values.get(field, wanted) != wanted:
            raise UserError(f"config.json has {field} {values[field]!r}; only {wanted!r} is implemented")


def pick(values: Mapping[str, Any], sizes: Mapping[str, str]) -> Values:
    """Returns the values of the fields on the right of `sizes`, under the names on the left."""
    missing = [field for field in sizes.values() if field not in values]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; take the one published with the weights")
    return {ours: values[theirs] for ours, theirs in sizes.items()}


def text_architecture(values: Values, dropout: float = 0.1) -> BertConfig:
    """Returns the text tower that a config.json describes, which may be that of a two-tower model.

    >>> sizes = {"vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    >>> sizes |= {"intermediate_size": 1536, "max_position_embeddings": 512}
    >>> text_architecture({"model_type": "bert", **sizes}).max_tokens
    512

    Args:
        values: of config.json in Hugging Face's terms.
        dropout: probability of the dropout in training.

    Raises:
        UserError: the architecture or one of its options is not implemented.
    """
    values = tower_values(values, "text")
    kind = values.get("model_type")
    architectures = {
        "bert": bert,
        **dict.fromkeys(ROBERTAS, roberta),
        "mpnet": mpnet,
        "distilbert": distilbert,
        "modernbert": modernbert,
        "clip_text_model": clip_text,
        "siglip_text_model": siglip_text,
    }
    if kind not in architectures:
        nearest = nearest_names(str(kind), architectures)
        raise UserError(
            f"config.json has model_type {kind!r}; expected one of {', '.join(architectures)}; nearest: {nearest}"
        )
    return BertConfig(**architectures[kind](values), dropout=dropout)


def bert(values: Values) -> Values:
    """Fields of the `BertConfig` of BERT (Devlin et al. 2018, arXiv 1810.04805)."""
    expect_options(values, {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False})
    eps, types = values.get("layer_norm_eps", 1e-12), values.get("type_vocab_size", 2)
    return pick(values, BERT_SIZES) | {"eps": eps, "types": types, "pool": values.get("pooling", "mean")}


def roberta(values: Values) -> Values:
    """Fields of RoBERTa (arXiv 1907.11692), XLM-R and CamemBERT: BERT with other numbers of positions."""
    return bert(values) | {"first_position": values.get("pad_token_id", 1) + 1}


def mpnet(values: Values) -> Values:
    """Fields of MPNet (Song et al. 2020, arXiv 2004.09297): RoBERTa with relative position bias, without types."""
    buckets = values.get("relative_attention_num_buckets", 32)
    return roberta(values) | {"types": 0, "buckets": buckets}


def distilbert(values: Values) -> Values:
    """Fields of DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT without types, in fields of its own names."""
    expect_options(values, {"activation": "gelu"})  # sinusoidal positions are stored as a table
    return pick(values, DISTILBERT_SIZES) | {"types": 0}


def modernbert(values: Values) -> Values:
    """Fields of ModernBERT (Warner et al. 2024, arXiv 2412.13663)."""
    expect_options(values, {"hidden_activation": "gelu", "position_embedding_type": "absolute"})
    biases = values.get("attention_bias", False), values.get("mlp_bias", False)
    if biases[0] != biases[1]:
        raise UserError(f"config.json has attention_bias and mlp_bias {biases}; only equal ones are implemented")
    sizes, every = pick(values, BERT_SIZES), values.get("global_attn_every_n_layers", 3)
    layers = range(min(sizes["layers"], MAX_LAYERS))
    kinds = values.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in layers]
    base = {kind: rotary_base(values, kind) for kind in sorted(set(kinds))}
    window = {"full_attention": 0, "sliding_attention": values.get("local_attention", 128) // 2}
    return sizes | {
        "eps": values.get("norm_eps", 1e-5),
        "types": 0,
        "pre_norm": True,
        "rotary": tuple((base[kind], window[kind]) for kind in kinds),
        "gated": True,
        "use_bias": biases[0],
        "norm_bias": values.get("norm_bias", False),
    }


def rotary_base(values: Values, kind: str) -> float:
    """Returns the base of the rotary position embeddings in ModernBERT's layers of a kind, in any of its versions."""
    field = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}[kind]
    default = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}[kind]
    parameters = (values.get("rope_parameters") or {}).get(kind) or {}
    expect_options(parameters, {"rope_type": "default"})
    base = parameters.get("rope_theta", values.get(field))
    return float(default if base is None else base)


def clip_text(values: Values) -> Values:
    """Fields of CLIP's text tower (Radford et al. 2021, arXiv 2103.00020)."""
    values = CLIP_TEXT_DEFAULTS | values
    other = {"types": 0, "pre_norm": True, "embedding_norm": False, "pool": "last"}
    own = {"eps": values["layer_norm_eps"], "activation": activation(values), "causal": values.get("causal", True)}
    own |= {field: values.get(field, False) for field in ("zero_padding", "class_token")}
    return pick(values, BERT_SIZES) | other | own


def siglip_text(values: Values) -> Values:
    """Fields of SigLIP's text tower (Zhai et al. 2023, arXiv 2303.15343): CLIP's, with attention in both directions."""
    return clip_text(SIGLIP_TEXT_DEFAULTS | values) | {"causal": False, "attends_padding": True}


def activation(values: Values) -> str:
    """Returns the activation that a config.json of CLIP or SigLIP names, one of `transformer.ACTIVATIONS`."""
    name = values["hidden_act"]
    if name not in ("gelu", "gelu_pytorch_tanh", "quick_gelu"):
        raise UserError(f"config.json has hidden_act {name!r}; expected gelu, gelu_pytorch_tanh or quick_gelu")
    return name
