"""The command `python -m zslflax.predict`."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zslflax import predict, search
from zslflax.data.sources import shapes
from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor
from zslflax.inference.test_names import NAMES_FILE
from zslflax.predict import main

CLASS_NAMES = ["red circle", "blue square", "a cat"]


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_the_command_classifies_and_draws(tiny_config, finished_workdir, tmp_path, monkeypatch, capsys):
    predictor, exported = Predictor.restore(finished_workdir), tmp_path / "exported"
    predictor.export(exported)
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    rng = np.random.default_rng(0)
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 41, 3), np.uint8)).save(path)
    (tmp_path / "names.txt").write_text("\n".join(CLASS_NAMES))
    expected = predictor.classify(paths, CLASS_NAMES, top_k=2)
    command = *paths, f"--workdir={exported}", "--top=2"
    for names in (",".join(CLASS_NAMES), tmp_path / "names.txt"):
        lines = run_command(monkeypatch, capsys, *command, f"--class-names={names}").splitlines()
        assert [lines[0], lines[3]] == list(map(str, paths)) and len(lines) == 6
        for line, (name, score) in zip(lines[1:3] + lines[4:], expected[0] + expected[1]):
            assert line.strip().startswith(name) and line.endswith(f" {score:.3f}")
    options = "--class-names=a cat,a dog,a cat", "--templates=the {}", f"--png={tmp_path}/p.png"
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, command), *options])
    main()
    other = capsys.readouterr()
    assert other.out == "" and f"wrote {tmp_path}/p.png" in other.err
    assert "zslflax: --class-names has names more than once: a cat\n" in other.err
    with Image.open(tmp_path / "p.png") as grid:
        assert grid.width > 600 and len(grid.getcolors(1 << 20)) > 100
    for incomplete in ([], ["--class-names=a cat,a dog"]):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, capsys, f"--workdir={exported}", *incomplete)
        assert "give images" in capsys.readouterr().err


def test_the_option_that_exported_a_model_says_where_it_went(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_command(monkeypatch, capsys, "--workdir=runs/demo", f"--export={tmp_path / 'model'}")
    message = f"--export is a command of its own now: zslflax export {tmp_path / 'model'} --workdir=runs/demo"
    assert message in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_json_has_a_line_for_each_image(tiny_config, finished_workdir, tmp_path, monkeypatch, capsys):
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    expected = Predictor.restore(finished_workdir).classify(paths, CLASS_NAMES, top_k=2, probabilities=True)
    command = *paths, f"--model={finished_workdir}", f"--class-names={','.join(CLASS_NAMES)}", "--top=2", "--json"
    for line, path, answer in zip(
        run_command(monkeypatch, capsys, *command).splitlines(), paths, expected, strict=True
    ):
        found = json.loads(line)
        assert found["image"] == str(path) and [c["name"] for c in found["classes"]] == [name for name, *_ in answer]
        for place, key in ((1, "cosine"), (2, "probability")):
            assert [c[key] for c in found["classes"]] == pytest.approx([values[place] for values in answer], abs=1e-5)


def test_an_address_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["a.png", "--class-names=a,b", "--workdir=nowhere", "--png=s3://bucket/a.png"]
    with pytest.raises(UserError, match="--png is '.*', an address"):
        run_command(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_its_images_and_a_broken_image_does_not_stop_the_others(
    tiny_config, finished_workdir, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["a.png", "b.png", "more/c.png"]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (20, 41, 3), np.uint8)).save(folder / name)
    command = [f"--workdir={finished_workdir}", "--class-names=a cat,a dog"]
    whole = run_command(monkeypatch, capsys, folder, *command)
    assert [line for line in whole.splitlines() if line.endswith("png")] == [str(folder / name) for name in names]
    (folder / "aa.png").write_bytes(b"no image")
    os.mkfifo(folder / "pipe.png")
    monkeypatch.setattr(sys, "argv", ["predict", str(folder), str(tmp_path / "nowhere.png"), *command])
    with pytest.raises(SystemExit, match="3 of the images could not be read; the others are answered"):
        main()
    out, err = capsys.readouterr()
    assert out == whole
    for words in ("aa.png: the data is not an image", "pipe.png is no regular file", "no file .*nowhere.png"):
        assert re.search(f"left out: .*{words}", err)


@pytest.mark.parametrize("command", [predict, search])
def test_fewer_than_one_answer_is_refused_at_once(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "a.png", "--model=nowhere", "--query=a", "--top=0"])
    with pytest.raises(SystemExit):
        command.main()
    assert "argument --top: expected a whole number from 1 on, found '0'" in capsys.readouterr().err


def test_an_empty_query_is_refused_before_images_are_embedded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["search", "a.png", "--model=nowhere", "--query=a", "--query= "])
    with pytest.raises(UserError, match="query 2 of 2 is empty"):
        search.main()


@pytest.mark.parametrize("command, option", [(predict, "--class-names=a cat,a dog"), (search, "--query=a cat")])
def test_it_is_said_when_no_image_could_be_read(
    command, option, tiny_config, finished_workdir, tmp_path, monkeypatch, capsys
):
    paths = [str(tmp_path / name) for name in ("a.png", "nowhere.png")]
    (tmp_path / "a.png").write_bytes(b"no image")
    monkeypatch.setattr(sys, "argv", ["command", *paths, f"--model={finished_workdir}", option])
    with pytest.raises(SystemExit, match="zslflax: none of the images could be read$"):
        command.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("left out") == 2


def test_without_class_names_those_of_the_runs_test_set_are_taken(
    tiny_config, finished_workdir, trained_workdir, tmp_path, monkeypatch, capsys
):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    (expected,) = Predictor.restore(finished_workdir).classify(tmp_path / "red.png", shapes.CLASS_NAMES)
    monkeypatch.setattr(sys, "argv", ["predict", str(tmp_path / "red.png"), f"--model={trained_workdir}", "--json"])
    main()
    out, err = capsys.readouterr()
    assert [found["name"] for found in json.loads(out)["classes"]] == [name for name, _ in expected]
    count, first = len(shapes.CLASS_NAMES), shapes.CLASS_NAMES[0]
    assert f"no --class-names: the {count} class names of the model's test set are taken ({first}, " in err
    (trained_workdir / NAMES_FILE).unlink()
    with pytest.raises(UserError, match="finished has no class names of its own; give --class-names="):
        main()


def test_a_reader_that_leaves_early_ends_the_command_quietly(learned_workdir, tmp_path):
    for i in range(130):  # more than fit in one chunk and in a pipe
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    names = ",".join(f"name {i} {'x' * 100}" for i in range(20))
    command = [sys.executable, "-m", "zslflax.predict", str(tmp_path), f"--workdir={learned_workdir}", "--top=20"]
    with subprocess.Popen(
        [*command, f"--class-names={names}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().endswith(".png\n")
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0 and "Broken pipe" not in errors and "Traceback" not in errors
