"""The commands of docs/guides.md, as they stand, with few steps."""

import re
import shlex
import subprocess
import sys
import tarfile

import pytest

from tests.testing.configs import ROOT, make_tiny_config
from tests.testing.flags import parse_flags, reset_flags
from zslflax import commands, main
from zslflax.data.sources.shapes import CLASS_NAMES, ensure_shards
from zslflax.data.sources.shard_patterns import expand_patterns

GUIDES = (ROOT / "docs" / "guides.md").read_text(encoding="utf-8")
FEWER = ["--config.steps=4", "--config.batch_size=16", "--config.eval.batch_size=16", "--config.eval.every=4"]
FEWER += ["--config.features.folder=features", "--config.compilation_cache=", "--config.eval.class_cache="]


def bash_commands(section: str) -> list[str]:
    """The commands of a section's bash blocks, each on one line."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", GUIDES, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


@pytest.fixture
def photos(shapes_root, tmp_path):
    """A folder of images with captions, another with labels, and the names of the classes."""
    shapes = make_tiny_config(shapes_root).data.shapes
    shards = ensure_shards(shapes_root, train=shapes.train, test=shapes.test, size=shapes.size)
    for spec, folder in ((shards.train, "photos"), (shards.test, "labelled")):
        (tmp_path / folder).mkdir()
        for path in expand_patterns(spec):
            with tarfile.open(path) as tar:
                for member in tar.getmembers()[:96]:
                    (tmp_path / folder / member.name).write_bytes(tar.extractfile(member).read())
    (tmp_path / "classes.txt").write_text("\n".join(CLASS_NAMES))
    return tmp_path


def test_from_a_folder_of_images_to_a_model(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    monkeypatch.setattr(main, "start_logging", lambda: None)
    monkeypatch.setattr(main.distributed, "initialize", lambda *_: None)
    outputs = {}
    for line in bash_commands("From a folder of images to a model"):
        _, name, *arguments = shlex.split(line, comments=True)
        command = commands.COMMANDS[name]
        if command.module == "zslflax.main":  # its flags can be defined once in a process
            try:
                parse_flags(monkeypatch, [*command.arguments, *arguments, *FEWER])
                assert main.main([]) == 0
            finally:
                reset_flags()
        else:
            monkeypatch.setattr(sys, "argv", ["zslflax", name, *arguments])
            monkeypatch.delitem(sys.modules, command.module, raising=False)
            commands.main()
        outputs[name] = capsys.readouterr().out
    assert '"eval/test/hit@1/low"' in outputs["evaluate"]
    number = len(list((photos / "photos").glob("*.jpg")))
    assert outputs["predict"].count("photos/") == number > 0 and outputs["search"].startswith("something red\n")
    assert (photos / "runs/photos/noise/noise.png").exists() and (photos / "model/zslflax.safetensors").exists()
    assert "photographs of my garden" in (photos / "model/README.md").read_text()


def test_what_the_pods_launchers_would_run(tmp_path):
    found = bash_commands("On a pod")
    assert len(found) == 3
    for command in found:
        command = command if "DRY_RUN=1" in command else f"DRY_RUN=1 {command}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "zslflax.main" in done.stdout
