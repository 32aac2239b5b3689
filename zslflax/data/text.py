"""Tokenizers of sentence encoders, loaded from the files of their Hugging Face repositories."""

import contextlib
import hashlib
import html
import json
import os
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from zslflax.errors import MissingFileError, UserError
from zslflax.files import read_json
from zslflax.models.import_weights.open_clip import tokenizer_options
from zslflax.saving import storage_errors, write_json, write_text

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SENTENCEPIECE_FILE = "spiece.model"  # of SigLIP
# SigLIP 2 has Gemma's tokenizer and was trained on text in lower case, which older copies of its files do not say.
GEMMA_TOKENIZERS = ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast")
VOCABULARY_FILES = {"BertTokenizer": ("vocab.txt",), "RobertaTokenizer": ("vocab.json", "merges.txt")}
MAX_VOCABULARY = 1 << 24  # ids; published vocabularies have up to 2**18. The backend aborts the process near 2**32
PUNCTUATION = tokenizers.Regex("[" + "".join(f"\\x{ord(mark):02x}" for mark in string.punctuation) + "]")
PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")  # tried where no file names the padding token

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the pipeline has threads of its own


class Tokenizer:
    """Turns texts into token ids of a fixed length. HTML's entities in them are decoded.

    Threads may share a tokenizer, and it can be pickled.

    Attributes:
        max_tokens: t, special tokens included; longer texts are truncated.
        pad_id: the id that fills up shorter texts.
        vocab_size: 1 + the largest id.
        identity: what two models must agree on to share tokens: `name` (the type of vocabulary), `sha256` of the
            vocabulary and the rules, `max_tokens` and `pad_id`; and `attends_padding`, where it is true.
        attends_padding: whether padding is part of the text, as SigLIP's towers were trained.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_tokens: int, pad_token: str, attends_padding: bool = False):
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
        } | ({"attends_padding": True} if attends_padding else {})
        self.attends_padding = attends_padding
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        backend.enable_truncation(max_tokens)
        backend.enable_padding(length=max_tokens, pad_id=self.pad_id, pad_token=pad_token)
        self.backend = backend

    @classmethod
    def from_folder(cls, folder: str | Path, max_tokens: int, attends_padding: bool = False) -> "Tokenizer":
        """Loads tokenizer.json, BERT's vocab.txt, vocab.json and merges.txt, or SigLIP's spiece.model; uses no network.

        Args:
            folder: of the files.
            max_tokens, attends_padding: as the attributes.

        Raises:
            MissingFileError: the folder has none of them.
            UserError: `max_tokens` is more than the encoder takes, or leaves no room beside the special tokens; there
                is no padding token; a file is damaged, or the tokenizer needs code of its own, which is never run.
        """
        folder = Path(folder)
        with tokenizer_errors(folder):
            config = read_json_if_present(folder / CONFIG_FILE)
            longest = config.get("model_max_length")
            if longest and max_tokens > longest:
                raise UserError(f"model.text.max_tokens is {max_tokens}, but the encoder in {folder} takes {longest}")
            check_ids(folder / CONFIG_FILE, map(int, config.get("added_tokens_decoder") or ()))
            if (folder / SENTENCEPIECE_FILE).is_file() and config.get("tokenizer_class") == "SiglipTokenizer":
                backend = load_siglip_tokenizer(folder / SENTENCEPIECE_FILE)
            elif (folder / TOKENIZER_FILE).is_file():
                check_ids(folder / TOKENIZER_FILE, listed_ids(read_json(folder / TOKENIZER_FILE)))
                backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
                if attends_padding and config.get("tokenizer_class") in GEMMA_TOKENIZERS:
                    steps = [tokenizers.normalizers.Lowercase(), *filter(None, [backend.normalizer])]
                    backend.normalizer = tokenizers.normalizers.Sequence(steps)
            else:
                backend = load_from_vocabulary(folder, config)
            if options := tokenizer_options(folder):
                steps = [*cleaning_steps(options["clean"]), *filter(None, [backend.normalizer])]
                backend.normalizer = tokenizers.normalizers.Sequence(steps)
                if options["strip_sep_token"]:
                    backend.post_processor = end_by_zero(folder, backend)
            return cls(backend, max_tokens, find_pad_token(folder, config, backend), attends_padding)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids, int32 [b, t], and the mask, bool [b, t], False at padding that is no part of the text."""
        # JSON can hold half a surrogate pair, which the backend refuses: it becomes "?".
        clean = [decode_entities(text).encode(errors="replace").decode() for text in texts]
        encoded = self.backend.encode_batch_fast(clean)
        ids = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.max_tokens)
        mask = np.array([e.attention_mask for e in encoded], bool).reshape(-1, self.max_tokens)
        return ids, mask | self.attends_padding

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_folder` and Hugging Face's AutoTokenizer load.

        Raises:
            StorageError: the folder cannot be written.
        """
        folder = Path(folder)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TOKENIZER_FILE, self.backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": self.pad_token}
        write_json(folder / CONFIG_FILE, config)


def decode_entities(text: str) -> str:
    """A text with the characters that HTML's entities in it mean.

    It is decoded twice, as CLIP does, because captions of web pages are often encoded twice.

    >>> decode_entities("Tom &amp;amp; J&eacute;r&ocirc;me &lt;3")
    'Tom & Jérôme <3'
    """
    return html.unescape(html.unescape(text)) if "&" in text else text


@contextlib.contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of damaged tokenizer files into a UserError that names the folder."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the backend raises many types, and a panic of it is no `Exception`
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded: {str(error)[:300] or type(error).__name__}; its files are "
            "damaged or of a kind that is not known here: put the published ones back"
        ) from error


def check_ids(path: Path, ids: Iterator[int]) -> None:
    """Refuses token ids that no published vocabulary has, before they reach the backend."""
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY:
            raise UserError(f"{path} has the token id {token_id!r}, expected a whole number below {MAX_VOCABULARY:,}")


def listed_ids(rules: dict[str, Any]) -> Iterator[int]:
    """Yields the ids that the content of a tokenizer.json lists."""
    vocabulary = rules["model"].get("vocab") or {}
    yield from vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    yield from (token["id"] for token in rules.get("added_tokens") or ())


def load_from_vocabulary(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer from vocabulary files alone.

    Args:
        folder: of the files.
        config: the content of `CONFIG_FILE`, {} if there is none.

    Raises:
        MissingFileError: there are no vocabulary files either.
        ValueError: transformers', of a tokenizer that needs code of its own.
    """
    classes = [name for name, files in VOCABULARY_FILES.items() if all((folder / file).is_file() for file in files)]
    if not classes:
        found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise MissingFileError(
            f"{folder} has no tokenizer: expected {TOKENIZER_FILE}, or vocab.txt, or vocab.json with merges.txt; "
            f"found: {found}"
        )
    for file in VOCABULARY_FILES[classes[0]]:
        if file.endswith(".json"):
            check_ids(folder / file, iter(read_json(folder / file).values()))
    # transformers is slow to import, and its AutoTokenizer imports torch where it is installed: only if necessary.
    import transformers

    known = "tokenizer_class" in config or "model_type" in read_json_if_present(folder / "config.json")
    loader = transformers.AutoTokenizer if known else getattr(transformers, classes[0])
    # Without trust_remote_code=False, transformers asks on the terminal whether to run the code that auto_map names.
    tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return tokenizer.backend_tokenizer


def load_siglip_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """SigLIP's tokenizer: text in lower case and without punctuation, in the pieces of a SentencePiece model.

    Raises:
        MissingFileError: the package protobuf, which reads the file, is not installed.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        model = import_protobuf().ModelProto()
    except ImportError as error:
        raise MissingFileError(f"{path} is read by the package protobuf: pip install protobuf") from error
    model.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, model.trainer_spec.unk_id))
    replace = tokenizers.normalizers.Replace
    characters = model.normalizer_spec.precompiled_charsmap
    backend.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Lowercase(),
            replace(PUNCTUATION, ""),
            *single_spaces(),
            *([tokenizers.normalizers.Precompiled(characters)] if characters else []),
            replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    end = next(i for i, piece in enumerate(model.pieces) if piece.piece == "</s>")
    template = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    backend.post_processor = template
    return backend


def cleaning_steps(kind: str) -> list[Any]:
    """How open_clip cleans a text before a tokenizer of Hugging Face, as normalizers.

    Characters are composed and typographic quotation marks become straight ones, as by ftfy. Its repair of wrongly
    decoded texts, of ligatures and of wide letters is left out.

    Args:
        kind: "whitespace": white space becomes single spaces; "lower": the case as well; "canonicalize": punctuation
            is left out, too.
    """
    replace, lowercase = tokenizers.normalizers.Replace, tokenizers.normalizers.Lowercase
    quotes = [("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"')]
    return [
        tokenizers.normalizers.NFC(),
        *(replace(tokenizers.Regex(marks), straight) for marks, straight in quotes),
        *([replace("_", " "), replace(PUNCTUATION, "")] if kind == "canonicalize" else []),
        *([] if kind == "whitespace" else [lowercase()]),
        *single_spaces(),
    ]


def end_by_zero(folder: Path, backend: tokenizers.Tokenizer) -> Any:
    """What adds a tokenizer's own token before a text, and the token 0 after it instead of its own (CLIPA).

    Raises:
        UserError: the tokenizer does not add one token on each side, as BERT's does.
    """
    backend.no_padding()
    added, zero = backend.encode(""), backend.id_to_token(0)
    if len(added.ids) != 2 or zero is None:
        found = ", ".join(added.tokens) or "no token"
        raise UserError(
            f"{folder} has tokenizer_kwargs.strip_sep_token, but its tokenizer adds {found} to a text; expected one "
            "token before it and one after it"
        )
    ids = [(added.tokens[0], added.ids[0]), (zero, 0)]
    return tokenizers.processors.TemplateProcessing(f"{added.tokens[0]} $A {zero}", special_tokens=ids)


def single_spaces() -> list[Any]:
    """Normalizers that replace white space by single spaces, of which none is at an end."""
    return [tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "), tokenizers.normalizers.Strip()]


def find_pad_token(folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> str:
    """The padding token that the folder's files name, or else one of `PAD_TOKENS` that the vocabulary has.

    Raises:
        UserError: there is none.
    """
    named = [config.get("pad_token"), read_json_if_present(folder / "special_tokens_map.json").get("pad_token")]
    tokens = [str(token["content"]) if isinstance(token, dict) else str(token) for token in named if token]
    for token in (*tokens, *PAD_TOKENS):
        if backend.token_to_id(token) is not None:
            return token
    raise UserError(
        f"the tokenizer in {folder} has no padding token: name one of its tokens as pad_token in {CONFIG_FILE}"
    )


def read_json_if_present(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} if there is no file."""
    return read_json(path) if path.is_file() else {}
