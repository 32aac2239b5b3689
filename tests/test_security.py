"""The package never executes what it reads: no pickles, no code in data, no unpacking of archives."""

import ast
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

import zslflax
from zslflax.data.sources import tar_index

MODULES = sorted(Path(zslflax.__file__).parent.rglob("*.py"))
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
    assert find_forbidden(path.read_text()) == []


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
