"""The commands of docs/guides.md, as they stand; trainings with few steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from tests.testing.configs import ROOT, make_tiny_config
from tests.testing.flags import parse_flags, reset_flags
from tests.testing.published import save_clip
from zslflax import commands, main
from zslflax.config_checks import validate
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


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs `zslflax` with arguments in this process, which has imported jax; returns what it prints."""
    monkeypatch.setattr(main, "start_logging", lambda: None)
    monkeypatch.setattr(main.distributed, "initialize", lambda *_: None)

    def run(line, more=()):
        _, name, *arguments = shlex.split(line, comments=True)
        command = commands.COMMANDS[name]
        if command.module == "zslflax.main":  # its flags can be defined once in a process
            try:
                parse_flags(monkeypatch, [*command.arguments, *arguments, *more])
                assert main.run([]) == 0
            finally:
                reset_flags()
        else:
            monkeypatch.setattr(sys, "argv", ["zslflax", name, *arguments])
            monkeypatch.delitem(sys.modules, command.module, raising=False)
            commands.main()
        return name, capsys.readouterr().out

    return run


def test_from_a_folder_of_images_to_a_model(photos, monkeypatch, run_command):
    monkeypatch.chdir(photos)
    outputs = dict(run_command(line, FEWER) for line in bash_commands("From a folder of images to a model"))
    assert '"eval/test/hit@1/low"' in outputs["evaluate"]
    number = len(list((photos / "photos").glob("*.jpg")))
    assert outputs["predict"].count("photos/") == number > 0 and outputs["search"].startswith("something red\n")
    assert (photos / "runs/photos/noise/noise.png").exists() and (photos / "model/zslflax.safetensors").exists()
    assert "photographs of my garden" in (photos / "model/README.md").read_text()


def test_clip_and_a_model_of_ones_own_on_open_images(
    require, finished_workdir, tiny_config, colour_folder, tmp_path, monkeypatch, run_command
):
    save_clip(require, tmp_path / "openai" / "clip-vit-base-patch32")
    shutil.copytree(finished_workdir, tmp_path / "runs" / "mine")
    folder, classes = tmp_path / "open-images", ["blue", "green", "red", "yellow"]
    (folder / "test").mkdir(parents=True)
    rows = ["ImageID,Source,LabelName,Confidence"]
    for i, path in enumerate(sorted(colour_folder.rglob("*.png"))):
        Image.open(path).save(folder / "test" / f"{i:016x}.jpg")
        rows += [f"{i:016x},verification,/m/0{name},{int(name == path.parent.name)}" for name in classes]
    (folder / "oidv7-test-annotations-human-imagelabels.csv").write_text("\n".join(rows))
    names = [f"/m/0{name},{name.title()}" for name in classes] + ["/m/0purple,Purple"]
    (folder / "oidv7-class-descriptions.csv").write_text("\n".join(["LabelName,DisplayName", *names]))
    monkeypatch.chdir(tmp_path)
    found = [run_command(line) for line in bash_commands("CLIP and your own model on Open Images")]
    assert [name for name, _ in found] == ["data", "evaluate", "evaluate"] and "24" in found[0][1]
    for (_, output), workdir in zip(found[1:], ("clip-vit-base-patch32", "mine")):
        measured = json.loads(output)
        assert measured["eval/open_images/hit@5"] == 1 and measured["eval/open_images/labelled"] == 24
        assert measured["eval/open_images/hit@1/low"] <= measured["eval/open_images/hit@1"] < 1
        assert list((tmp_path / "runs" / workdir / "evaluation").glob("*.png"))
    assert (tmp_path / "open-images.png").is_file()


def test_the_commands_from_cc3m_to_the_papers_table(monkeypatch, tmp_path):
    """The shell expands the loop; each command of this project gives a valid config, or is among its overrides."""
    (text,) = re.findall(r"```bash\n(launch/prepare_cc3m.*?)```", GUIDES, re.DOTALL)
    program = 'zslflax() { printf "zslflax"; printf " %q" "$@"; echo; }\n'
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1"}
    done = subprocess.run(["bash", "-ec", program + text], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prepare, *found = done.stdout.splitlines()
    assert prepare.startswith("img2dataset") and len(found) == 8
    objectives = []
    for line in found:
        _, name, *arguments = shlex.split(line)
        try:
            config = parse_flags(monkeypatch, [*commands.COMMANDS[name].arguments, *arguments])
        finally:
            reset_flags()
        if name == "train":
            validate(config)
            objectives.append(config.objective.name)
            assert config.data.train == ("cc3m/{00000..00331}.tar",) and config.steps == 56_000
        else:
            assert set(config.eval.sets) == {"test", "open_images", "imagenet"}
    assert objectives == ["info_nce", "label_smoothing", "self_distillation", "otter"]


def test_what_the_pods_launchers_would_run(tmp_path):
    found = bash_commands("On a pod")
    assert len(found) == 3
    for command in found:
        command = command if "DRY_RUN=1" in command else f"DRY_RUN=1 {command}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "zslflax.main" in done.stdout
