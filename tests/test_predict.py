"""The command `python -m zslflax.predict`."""

import sys

import numpy as np
import pytest
from PIL import Image

from zslflax.inference.predictor import Predictor
from zslflax.predict import main

CLASS_NAMES = ["red circle", "blue square", "a cat"]


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_the_command_classifies_draws_and_exports(tiny_config, finished_workdir, tmp_path, monkeypatch, capsys):
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
    other = run_command(
        monkeypatch, capsys, *command, "--class-names=a cat,a dog", "--templates=the {}", f"--png={tmp_path}/p.png"
    )
    assert other == ""
    with Image.open(tmp_path / "p.png") as grid:
        assert grid.width > 600 and len(grid.getcolors(1 << 20)) > 100
    run_command(monkeypatch, capsys, f"--workdir={exported}", f"--export={tmp_path / 'copy'}")
    assert Predictor.restore(tmp_path / "copy").step == 6
    for incomplete in ([], [paths[0]], ["--class-names=a cat,a dog"], [paths[0], f"--export={tmp_path / 'other'}"]):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, capsys, f"--workdir={exported}", *incomplete)
        assert "give images and --class-names" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
