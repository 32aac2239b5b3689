"""Text encoders that open_clip takes from Hugging Face by name: their config.json, which is not in its folders."""

from pathlib import Path
from typing import Any

from zslflax.errors import MissingFileError
from zslflax.files import read_json

BERT = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "hidden_act": "gelu",
}
ROBERTA = BERT | {
    "model_type": "roberta",
    "vocab_size": 50_265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
XLM_ROBERTA = ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250_002}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KNOWN = {  # those of LAION's models and of BiomedCLIP
    "roberta-base": ROBERTA,
    "xlm-roberta-base": XLM_ROBERTA,
    "xlm-roberta-large": XLM_ROBERTA | LARGE,
    "bert-base-uncased": BERT,
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": BERT,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": BERT,
}


def read_encoder_config(folder: Path, name: str) -> dict[str, Any]:
    """Returns the config.json of an encoder.

    A model is read from its own folder alone: an encoder that is not `KNOWN` has its config.json in a folder of its
    name there.

    Args:
        folder: of the model.
        name: of the encoder on the Hugging Face Hub.

    Raises:
        MissingFileError: the file is not there; the message says how to get it.
    """
    if name in KNOWN:
        return KNOWN[name]
    path = folder / name / "config.json"
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise MissingFileError(
            f"{folder} has the text encoder {name!r}, whose sizes are in a file of its own; download that into the "
            f"model's folder: hf download {name} config.json --local-dir '{folder / name}'"
        )
    return read_json(path)
