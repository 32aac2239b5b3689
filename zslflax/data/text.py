"""Tokenizers of sentence encoders, in the files that Hugging Face's models come with."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from zslflax.errors import MissingFileError, UserError

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
VOCABULARIES = {"BertTokenizer": ("vocab.txt",), "RobertaTokenizer": ("vocab.json", "merges.txt")}
PAD_TOKENS = ("[PAD]", "<pad>")  # where no file says which

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the pipeline has threads of its own


class Tokenizer:
    """Texts to token ids of a static length.

    Threads may share a tokenizer, and it can be pickled.

    Attributes:
        max_tokens: t; longer texts are truncated, special tokens counted.
        pad_id: fills shorter ones.
        vocab_size: one more than the largest id.
        identity: what two models must agree on to share tokens: `name` (the kind of vocabulary), `sha256` of
            vocabulary and rules, `max_tokens` and `pad_id`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_tokens: int, pad_token: str):
        special = backend.num_special_tokens_to_add(is_pair=False)
        if max_tokens <= special:
            raise UserError(f"max_tokens is {max_tokens}, expected more than the {special} special tokens")
        self.max_tokens, self.pad_token, self.pad_id = max_tokens, pad_token, backend.token_to_id(pad_token)
        backend.no_padding()
        backend.no_truncation()
        rules = json.loads(backend.to_str())
        self.identity = {
            "name": rules["model"]["type"],
            "sha256": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
            "max_tokens": max_tokens,
            "pad_id": self.pad_id,
        }
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        backend.enable_truncation(max_tokens)
        backend.enable_padding(length=max_tokens, pad_id=self.pad_id, pad_token=pad_token)
        self.backend = backend

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens: int) -> "Tokenizer":
        """Loads tokenizer.json, BERT's vocab.txt, or RoBERTa's vocab.json and merges.txt; needs no network.

        Raises:
            FileNotFoundError: the folder has none of them.
            ValueError: more tokens than the encoder takes, too few for the special ones, no padding token.
        """
        folder = Path(folder)
        settings = read_json(folder / SETTINGS)
        longest = settings.get("model_max_length")
        if longest and max_tokens > longest:
            raise UserError(f"model.text.max_tokens is {max_tokens}, but the encoder in {folder} takes {longest}")
        if (folder / FAST).is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / FAST))
        else:
            backend = convert(folder, settings)
        if backend is None:
            there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
            raise MissingFileError(
                f"{folder} has no tokenizer: expected {FAST}, or vocab.txt, or vocab.json with merges.txt; "
                f"found: {there}"
            )
        return cls(backend, max_tokens, find_pad_token(folder, settings, backend))

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [b, t] and the mask bool [b, t], which is False at padding."""
        # Halves of surrogate pairs, which JSON can hold, are no text to the backend.
        encoded = self.backend.encode_batch_fast([text.encode(errors="replace").decode() for text in texts])
        ids = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.max_tokens)
        mask = np.array([e.attention_mask for e in encoded], bool).reshape(-1, self.max_tokens)
        return ids, mask

    def save(self, folder: str | Path) -> None:
        """Writes what `from_folder`, and Hugging Face's AutoTokenizer, loads again."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / FAST))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": self.pad_token}
        (folder / SETTINGS).write_text(json.dumps(settings))


def convert(folder: Path, settings: dict) -> tokenizers.Tokenizer | None:
    """A tokenizer of vocabulary files alone; None where there are none."""
    kinds = [kind for kind, files in VOCABULARIES.items() if all((folder / name).is_file() for name in files)]
    if not kinds:
        return None
    import transformers  # slow, and its AutoTokenizer imports torch where it is installed: only if it must be

    described = "tokenizer_class" in settings or "model_type" in read_json(folder / "config.json")
    kind = transformers.AutoTokenizer if described else getattr(transformers, kinds[0])
    return kind.from_pretrained(str(folder), local_files_only=True).backend_tokenizer


def find_pad_token(folder: Path, settings: dict, backend: tokenizers.Tokenizer) -> str:
    """The padding token that the folder's files name, or else the usual one that the vocabulary has."""
    named = [settings.get("pad_token"), read_json(folder / "special_tokens_map.json").get("pad_token")]
    named = [token["content"] if isinstance(token, dict) else token for token in named if token]
    for token in (*named, *PAD_TOKENS):
        if backend.token_to_id(token) is not None:
            return token
    raise UserError(
        f"the tokenizer in {folder} has no padding token: name one of its tokens as pad_token in {SETTINGS}"
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
