"""The command: its flags, and what it says when one is wrong."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from zslflax import config, main

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def parse(monkeypatch):
    """Parses arguments as the command does and returns its config."""

    def parse(*arguments, config="demo.py"):
        forget()
        monkeypatch.setattr(sys, "argv", ["main", f"--config={CONFIGS / config}", *arguments])
        main.parse(sys.argv)
        return main.CONFIG.value

    yield parse
    forget()


def forget():
    """Undoes the parsing, and the flags that ml_collections defined for the overrides."""
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


def test_overrides(parse):
    c = parse("--config.batch_size=32", "--config.data.train=a/{000..331}.tar", "--config.eval.sets.test.names=cat,dog")
    assert c.batch_size == 32 and c.data.train == ("a/{000..331}.tar",) and c.eval.sets.test.names == "cat,dog"
    assert parse("--config.data.train=('a.tar','b.tar')").data.train == ("a.tar", "b.tar")


@pytest.mark.parametrize("objective", ["", "info_nce", "label_smoothing", "self_distillation", "otter", "sigmoid"])
def test_the_argument_selects_the_objective(parse, objective):
    c = parse(config=f"r50_declutr.py:{objective}" if objective else "r50_declutr.py")
    assert c.objective.name == (objective or "self_distillation")
    assert c.name == "r50_declutr" + (f"_{objective}" if objective else "")
    for file in ("r50_declutr", "demo"):
        scale = math.exp(parse(config=f"{file}.py:{objective}").objective.log_logit_scale)
        assert (objective == "sigmoid") == (abs(scale - 10) < 1e-3)  # SigLIP's, section 3.2


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.batch_sizes=3", r"--config.batch_sizes: there is no such field; nearest: .*batch_size"),
        ("--config.data.trian=x", r"--config.data.trian: there is no such field; nearest: data.train"),
        (
            "--config.eval.sets.tset.data=x",
            r"eval.sets.tset.data: there is no such field; nearest: eval.sets.test.data",
        ),
    ],
)
def test_a_mistyped_field_is_named_with_the_nearest(parse, argument, message):
    with pytest.raises(ValueError, match=message):
        parse(argument)


def test_a_wrong_type_is_named(parse):
    with pytest.raises(SystemExit, match="--config.batch_size=many"):
        parse("--config.batch_size=many")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("objective.alpha", 1.5, "objective.alpha is 1.5"),
        ("objective.name", "info_nse", "objective.name is 'info_nse'.*nearest: info_nce"),
        ("objective.max_similarities", -1, "objective.max_similarities is -1"),
        ("micro_batch", -1, "micro_batch is -1"),
        ("profile_steps", "100-105", "profile_steps is '100-105', expected FIRST:LAST, two of the steps 1 to 1000"),
        ("profile_steps", "105:100", "profile_steps is '105:100', expected FIRST:LAST"),
        ("profile_steps", "999:1001", "profile_steps is '999:1001', expected FIRST:LAST"),
        ("profile_steps", "0:5", "profile_steps is '0:5', expected FIRST:LAST"),
        ("teacher.kind", "none", "self_distillation learns from a teacher"),
        ("teacher.kind", "checkpoint", "a workdir goes with kind checkpoint"),
        ("steps", 0, "steps is 0"),
        ("eval.every", -3, "eval.every is -3"),
        ("data.weights", (1.0, 2.0), "data.weights has 2 values for the 1 sources"),
        ("data.weights", (0.0,), r"data.weights are \(0.0,\), expected each to be above 0"),
        ("data.crop_scale", (0.0, 1.0), r"data.crop_scale is \(0.0, 1.0\), expected 0 < smallest"),
        ("data.max_bad_fraction", 5.0, "data.max_bad_fraction is 5.0, expected a share"),
        (
            "eval.best_metric",
            "eval/tset/hit@1",
            "eval.best_metric is 'eval/tset/hit@1', expected eval/SET/METRIC.*: test$",
        ),
        ("eval.resize_factor", 0.9, "eval.resize_factor is 0.9, expected at least 1"),
        ("optimizer.warmup_steps", 5_000, r"optimizer.warmup_steps is 5000, expected 0 to \d+, for steps is"),
        ("optimizer.max_nonfinite_steps", -1, "optimizer.max_nonfinite_steps is -1"),
        (
            "freeze",
            (("image", -1),),
            "freeze has 'image' for ever, but model.image.pretrained is empty.*nearest that works",
        ),
        ("freeze", ("text/tower", -1), r"freeze is \('text/tower', -1\), expected pairs of a pattern and a number"),
        ("freeze", (("text/tower", -2),), "expected steps, or -1 for ever"),
        (
            "optimizer.lr_multipliers",
            ("image",),
            r"optimizer.lr_multipliers is \('image',\), expected pairs of a pattern",
        ),
        ("data.crop_scale", (0.5,), "expected two shares of the area"),
        ("freeze", (("image/tower[", 3),), r"freeze: 'image/tower\[' is not a regular expression"),
    ],
)
def test_what_contradicts_itself_is_refused(parse, field, value, message):
    c = parse()
    *path, leaf = field.split(".")
    node = c
    for part in path:
        node = node[part]
    node[leaf] = value
    with pytest.raises(ValueError, match=message):
        config.validate(c)


def test_a_batch_that_the_devices_cannot_share(parse):
    c = parse("--config.batch_size=256")
    with pytest.raises(
        ValueError, match="batch_size is 256, which 3 devices cannot share evenly; nearest that works: 255"
    ):
        config.check_devices(c, 3)
    c.micro_batch = 48
    with pytest.raises(ValueError, match="micro_batch is 48, .* the 64 pairs of a device; nearest that works: 32"):
        config.check_devices(c, 4)
    c.micro_batch = 16
    config.check_devices(c, 4)


def test_a_file_of_templates_travels_with_the_config(parse, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    c = parse(f"--config.eval.templates={tmp_path / 'prompts.txt'}")
    config.resolve(c)
    assert c.eval.templates == ("a photo of a {}.", "a drawing of a {}.")


def test_launchers_may_name_the_status_of_a_run_that_was_stopped(parse, monkeypatch, tmp_path):
    monkeypatch.setattr(main.telemetry, "start_logging", lambda: None)
    monkeypatch.setattr(main.parallel, "start", lambda *_: None)
    for argument, complete, status in (("0", False, 0), ("143", False, 143), ("143", True, 0)):
        monkeypatch.setattr(main, "train", lambda *_, complete=complete: complete)
        parse(f"--workdir={tmp_path}", f"--stopped_status={argument}")
        assert main.main([]) == status


def test_json_and_back(parse):
    c = parse("--config.data.train=('a','b')", config="vit_b16_declutr.py")
    assert config.compare(c, config.from_json(config.to_json(c))) == []


def test_a_person_sees_a_message_and_a_programmer_the_traceback(tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "zslflax.main",
        f"--config={CONFIGS / 'demo.py'}",
        f"--workdir={tmp_path}",
        "--mode=evaluate",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    person = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert person.returncode == 1 and "has no config.json" in person.stderr and "Traceback" not in person.stderr
    programmer = subprocess.run(
        arguments, env={**environment, "ZSLFLAX_TRACEBACK": "1"}, capture_output=True, text=True, timeout=120
    )
    assert programmer.returncode == 1 and "Traceback" in programmer.stderr
