"""The command `zslflax`: the table of its commands, names of shipped configs, and the installed wheel."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

import zslflax
from tests.testing.configs import CONFIG_FILES, ROOT
from zslflax import commands, search
from zslflax.config_file import find_config_file
from zslflax.errors import MissingFileError


def run(*arguments, cwd, path=ROOT, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_list_of_commands_imports_nothing_that_is_slow(tmp_path):
    program = """
import sys
from zslflax.commands import main
sys.argv = ["zslflax", *sys.argv[1:]]
main()
assert not {"jax", "numpy", "absl", "tqdm"} & set(sys.modules)
"""
    for arguments in ([], ["--help"]):
        done = run("-c", program, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert all(f"  {name} " in done.stdout for name in commands.COMMANDS)
    assert run("-c", program, "--version", cwd=tmp_path).stdout == f"zslflax {zslflax.__version__}\n"
    command = f"{sys.executable} -m zslflax.commands --help"
    piped = run("-c", f"import os; os.system('(sleep 0.5; {command}; echo $? >&2) | true')", cwd=tmp_path)
    assert piped.stderr == "0\n"


def test_every_command_is_a_module_that_exists():
    for name, command in commands.COMMANDS.items():
        assert importlib.util.find_spec(command.module), name


def test_an_unknown_command_is_named_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zslflax", "evalute", "--config=demo"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "zslflax: there is no command 'evalute'; nearest: evaluate\n"


def test_a_command_gets_the_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zslflax", "search", "--help"])
    monkeypatch.delitem(sys.modules, "zslflax.search")  # a new process has not imported it
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert not ended.value.code and capsys.readouterr().out.startswith("usage: zslflax search")


def test_a_shipped_config_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "zslflax" / "configs"
    assert sorted(path.name for path in folder.glob("*.py")) == [path.name for path in CONFIG_FILES]
    rest = ["--config.steps=3", "--workdir=demo"]
    assert find_config_file(["main", "--config=demo", *rest]) == ["main", f"--config={folder / 'demo.py'}", *rest]
    assert find_config_file(["--config", "demo:otter"]) == ["--config", f"{folder / 'demo.py'}:otter"]
    path = f"--config={folder / 'photos.py'}:otter"
    assert find_config_file([path]) == [path]
    (tmp_path / "demo").write_text("")  # a file of the user's comes first
    assert find_config_file(["--config=demo"]) == ["--config=demo"]
    for argument in ("--config=demmo", "--config=configs/demmo.py", "--config=demmo:otter"):
        with pytest.raises(SystemExit, match="there is no such file; nearest of the shipped configs .*: demo$"):
            find_config_file([argument])


def test_an_installed_wheel_has_the_configs_and_the_command(tmp_path):
    source, empty = tmp_path / "source", tmp_path / "empty"
    empty.mkdir()
    for name in ("zslflax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"
    built = run("-c", build, str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("*.whl") or pytest.fail(built.stderr)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "zslflax = zslflax.commands:main" in archive.read(entry_points).decode()
    arguments = ("-m", "zslflax.commands", "train", "--config=demo:otter", "--workdir=gs://bucket/run")
    done = run(*arguments, cwd=empty, path=tmp_path / "installed")
    assert done.returncode == 1 and "--workdir is 'gs://bucket/run', an address" in done.stderr
    assert not list(empty.iterdir())


class TestSearch:
    @pytest.fixture
    def run_search(self, monkeypatch, capsys):
        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["search", *map(str, arguments)])
            search.main()
            return capsys.readouterr().out

        return run

    @pytest.fixture
    def folder(self, tmp_path):
        for i, colour in enumerate(["red", "green", "blue", "white"]):
            Image.new("RGB", (20, 20), colour).save(tmp_path / f"{i}.png")
        return tmp_path

    def test_each_query_gets_the_best_images(self, tiny_config, finished_workdir, folder, run_search):
        predictor = zslflax.Predictor.restore(finished_workdir)
        queries, paths = ["a red circle", "something blue"], sorted(folder.glob("*.png"))
        expected = predictor.search(queries, paths, top_k=3)
        command = folder, f"--workdir={finished_workdir}", "--top=3", *[f"--query={query}" for query in queries]
        answers = [json.loads(line) for line in run_search(*command, "--json").splitlines()]
        assert [answer["query"] for answer in answers] == queries
        for answer, of_query in zip(answers, expected):
            assert [image["image"] for image in answer["images"]] == [str(paths[i]) for i, _ in of_query]
            assert [image["cosine"] for image in answer["images"]] == pytest.approx([s for _, s in of_query], abs=1e-5)
        lines = run_search(*command).splitlines()
        assert lines[::4] == queries and str(paths[expected[0][0][0]]) in lines[1]

    def test_a_broken_image_does_not_stop_the_others(self, tiny_config, finished_workdir, folder, run_search, capsys):
        (folder / "5.png").write_bytes(b"no image")
        with pytest.raises(SystemExit, match="1 of the images could not be read; the others were searched"):
            run_search(folder, f"--workdir={finished_workdir}", "--query=red", "--json")
        out, err = capsys.readouterr()
        assert len(json.loads(out)["images"]) == 4 and "left out: " in err and "5.png" in err


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("predict", ["image.png", "--class-names=a,b"]),
        ("search", ["image.png", "--query=a"]),
        ("export", ["{new}"]),
        ("noise", ["--data=shapes"]),
        ("few-shot", ["--data=folder:{colours}"]),
        ("app", []),
    ],
)
def test_the_model_may_be_called_model_or_workdir(name, arguments, colour_folder, tmp_path, monkeypatch):
    command = importlib.import_module(commands.COMMANDS[name].module)
    arguments = [argument.format(new=tmp_path / "new", colours=colour_folder) for argument in arguments]
    (tmp_path / "empty").mkdir()
    for option in ("--model", "--workdir"):
        monkeypatch.setattr(sys, "argv", [name, *arguments, f"{option}={tmp_path / 'empty'}"])
        with pytest.raises(MissingFileError, match=f"{tmp_path / 'empty'} has no config.json"):
            command.main()
