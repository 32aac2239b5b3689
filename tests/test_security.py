"""The package never executes what it reads: no pickles, no code in data, no unpacking of archives."""

import ast
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import zslflax
from tests.testing.configs import MINILM, ROOT
from zslflax.data.sources import tar_index
from zslflax.data.text import Tokenizer
from zslflax.errors import UserError
from zslflax.models.import_weights.locate import locate

# data/workers.py unpickles what the run and its own workers send each other through descriptors that they inherit.
MODULES = sorted(path for path in Path(zslflax.__file__).parent.rglob("*.py") if path.name != "workers.py")
IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
    "subprocess",
    "runpy",
    "yaml",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "extractall",
    "extract",
    "unpack_archive",
    "system",
    "popen",
}
# What a module may use, because it runs nothing that it reads.
EXCEPTIONS = {
    "cifar.py": ["pickle"],  # an unpickler that knows arrays alone; tests/data/sources/test_ready_sets.py
    "clip_benchmark.py": ["torch", "torch"],  # makes tensors of arrays
    "commands.py": ["runpy"],  # runs modules of its own table
    "peers.py": ["subprocess"],  # prints a line when the process is gone
}
ARGUMENTS = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "weights_only": False}


def find_forbidden(source: str) -> list[str]:
    """The imports, calls and arguments of the lists above that a module has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in IMPORTS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in IMPORTS else []
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of = getattr(getattr(node.func, "value", None), "id", "")
            found += [name] if name in CALLS and (of, name) != ("re", "compile") else []
            found += [k.arg for k in node.keywords if k.arg in ARGUMENTS and not is_safe_value(k)]
    return found


def is_safe_value(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Constant) and keyword.value.value is not ARGUMENTS[keyword.arg]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_unpickles_evaluates_or_unpacks_what_it_reads(path):
    assert find_forbidden(path.read_text()) == EXCEPTIONS.get(path.name, [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "eval(text)",
        "tar.extractall(folder)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "os.system(command)",
    ],
)
def test_the_search_finds_each_of_them(source):
    assert find_forbidden(source) and not find_forbidden("np.load(f, allow_pickle=False)\nre.compile(p)")


def test_an_index_file_with_a_pickle_is_rebuilt_and_the_pickle_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shard, ran = tmp_path / "a.tar", tmp_path / "ran"
    with tarfile.open(shard, "w") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    index = tar_index.load_index(str(shard))

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    place = tmp_path / ("a.tar" + tar_index.SUFFIX)
    evil = np.array([Evil()], object)
    np.savez(place, **{**vars(index), "keys": evil})
    np.testing.assert_array_equal(tar_index.load_index(str(shard)).keys, index.keys)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert ran.exists()  # the pickle does run where it is loaded


@pytest.mark.parametrize("known", [True, False])
def test_a_tokenizer_with_code_of_its_own_is_neither_run_nor_asked_about(known, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = {"tokenizer_class": "BertTokenizer" if known else "EvilTokenizer"}
    config["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    program = (
        "import sys; from zslflax.data.text import Tokenizer; from zslflax.errors import UserError\n"
        "try:\n    print(Tokenizer.from_folder(sys.argv[1], 8).vocab_size)\n"
        "except UserError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path], input="y\n" * 9, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    answer = str(len(words)) if known else f"the tokenizer in {tmp_path} cannot be loaded"
    assert result.stdout.startswith(answer) and "[y/N]" not in result.stdout + result.stderr
    assert not (tmp_path / "ran").exists()


def test_damaged_tokenizers_are_refused_and_never_abort_the_process(tmp_path):
    good = json.loads((locate(MINILM) / "tokenizer.json").read_text())
    absurd_word, absurd_token = copy.deepcopy(good), copy.deepcopy(good)
    absurd_word["model"]["vocab"]["cat"] = 2**32 - 2
    absurd_token["added_tokens"][0]["id"] = 2**31
    negative = copy.deepcopy(good)
    negative["model"]["vocab"]["cat"] = -1
    cases = {
        json.dumps(absurd_word): "has the token id 4294967294, expected a whole number below 16,777,216",
        json.dumps(absurd_token): "has the token id 2147483648, expected",
        json.dumps(negative): "has the token id -1, expected",
        json.dumps(good)[:1000]: "is not valid JSON",
        json.dumps({"model": {"type": "Evil"}}): "cannot be loaded",
        json.dumps([1]): "holds a JSON list",
        json.dumps({"model": []}): "cannot be loaded",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "is a Git LFS pointer",
    }
    for content, message in cases.items():
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=f"{tmp_path}.* {message}"):
            Tokenizer.from_folder(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    for config in (
        {"model_max_length": "long"},
        {"pad_token": {"x": 1}},
        {"added_tokens_decoder": {"99999999999": {}}},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"{tmp_path}"):
            Tokenizer.from_folder(tmp_path, 8)
