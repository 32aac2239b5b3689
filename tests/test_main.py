"""The command: its flags, its exit status, and its messages when something is wrong."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.testing.configs import ROOT
from tests.testing.flags import parse_flags, reset_flags
from zslflax import main
from zslflax.config import default_config, eval_set
from zslflax.config_checks import check_paths
from zslflax.errors import UserError
from zslflax.inference.prompts import resolve_templates

DEMO = ROOT / "configs" / "demo.py"
START = (
    "from zslflax.config import default_config\ndef get_config():\n    c = default_config()\n    "  # of a config file
)


@pytest.fixture
def parse(monkeypatch):
    """Parses arguments as the command does, and returns its config."""

    yield lambda *arguments, config=DEMO: parse_flags(
        monkeypatch, [*([f"--config={config}"] if config else []), *arguments]
    )
    reset_flags()


def test_overrides(parse):
    c = parse(
        "--config.batch_size=32",
        "--config.data.train=a/{000..331}.tar",
        "--config.eval.sets.test.class_names=cat,dog",
    )
    assert c.batch_size == 32 and c.data.train == ("a/{000..331}.tar",) and c.eval.sets.test.class_names == "cat,dog"
    assert parse("--config.data.train=('a.tar','b.tar')").data.train == ("a.tar", "b.tar")


def test_an_override_of_the_data_of_a_new_test_set_adds_it(parse):
    c = parse("--config.eval.sets.pets.data=folder:pets", "--config.eval.sets.pets.unseen=cat")
    assert c.eval.sets.pets.to_dict() == eval_set(data="folder:pets", unseen="cat").to_dict()
    assert sorted(c.eval.sets) == ["pets", "test"]
    with pytest.raises(UserError, match="eval.sets.pets.date: there is no such field; nearest: .*eval.sets.pets.data"):
        parse("--config.eval.sets.pets.data=folder:pets", "--config.eval.sets.pets.date=1")


def test_an_evaluation_takes_its_config_from_the_workdir_and_overrides_from_the_command(
    parse, main_without_set_up, monkeypatch, tmp_path
):
    calls = []
    monkeypatch.setattr(main, "evaluate_run", lambda *arguments: calls.append(arguments))
    for config in (None, DEMO):
        override = "--config.eval.sets.pets.unseen=cat"  # a set that only the run may have
        parse("--mode=evaluate", f"--workdir={tmp_path}", override, "--step=3", config=config)
        assert main_without_set_up.run([]) == 0
    assert calls == 2 * [(tmp_path, {"eval.sets.pets.unseen": "cat"}, 3)]


def test_another_model_is_evaluated_on_the_test_sets_of_the_command_or_of_a_config(
    parse, main_without_set_up, monkeypatch, tmp_path
):
    calls = []
    monkeypatch.setattr(main, "evaluate_model", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    arguments = "--mode=evaluate", "--model=some-org/clip", "--config.eval.sets.pets.data=pets:/data"
    overrides = {"eval.sets.pets.data": "pets:/data"}
    parse(*arguments, config=None)
    assert main_without_set_up.run([]) == 0
    assert calls == [("some-org/clip", tmp_path / "runs" / "clip", overrides, None)]
    config = parse(*arguments, f"--workdir={tmp_path / 'other'}")
    assert main_without_set_up.run([]) == 0
    assert calls[1:] == [("some-org/clip", tmp_path / "other", overrides, config)]
    assert config.eval.sets.test.data == "shapes"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=clip"], "--model=clip is for --mode=evaluate"),
        (["--model=clip", "--mode=evaluate", "--step=3"], "--step is that of a checkpoint of --workdir"),
        (["--mode=evaluate", "--config.eval.sets.a.data=b"], "Give --workdir, a training run, or --model"),
    ],
)
def test_flags_that_would_have_no_effect_or_lack_another_are_refused(parse, main_without_set_up, arguments, message):
    parse(*arguments, config=None if "--mode=evaluate" in arguments else DEMO)
    with pytest.raises(UserError, match=message):
        main_without_set_up.run([])


@pytest.mark.parametrize("objective", ["", "info_nce", "label_smoothing", "self_distillation", "otter", "sigmoid"])
def test_the_argument_of_a_config_file_selects_the_objective(parse, objective):
    r50 = ROOT / "configs" / "r50_declutr.py"
    c = parse(config=f"{r50}:{objective}" if objective else r50)
    assert c.objective.name == (objective or "self_distillation")
    assert c.name == "r50_declutr" + (f"_{objective}" if objective else "")
    for file in (r50, DEMO):
        scale = math.exp(parse(config=f"{file}:{objective}").objective.log_logit_scale)
        assert (objective == "sigmoid") == (abs(scale - 10) < 1e-3)  # SigLIP's initial scale


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.batch_sizes=3", r"--config.batch_sizes: there is no such field; nearest: .*batch_size"),
        ("--config.data.trian=x", r"--config.data.trian: there is no such field; nearest: data.train"),
        (
            "--config.eval.sets.tset.unseen=x",
            r"eval.sets.tset.unseen: there is no such field; nearest: eval.sets.test.unseen",
        ),
        ("--config.teacher.decay=0.9", r"teacher.decay: there is no such field; it is called teacher.ema_decay now"),
        (
            "--config.eval.sets.test.names=a,b",
            r"test.names: there is no such field; it is called eval.sets.test.class_names now",
        ),
    ],
)
def test_a_mistyped_field_is_named_with_the_nearest(parse, argument, message):
    with pytest.raises(UserError, match=message):
        parse(argument)


@pytest.mark.parametrize(
    "arguments, config, message",
    [
        (["--config.batch_size=many"], DEMO, "--config.batch_size=many: expected a whole number, found 'many'"),
        (["--config.optimizer.learning_rate=fast"], DEMO, "learning_rate=fast: expected a number, found 'fast'"),
        (["--config.data.flip=maybe"], DEMO, "--config.data.flip=maybe: expected true or false, found 'maybe'"),
        (["--config.model=vit"], DEMO, "model is a group of fields; set one: --config.model.FIELD=VALUE"),
        (["--config.data.train=x"], None, "--config=NAME is missing, such as --config=photos; shipped configs: coco_"),
        (["--mode=train_it"], DEMO, "--mode=train_it: value should be one of <train|evaluate>"),
        (["--step=first"], DEMO, "--step=first"),
        (["--stopped_status=256"], DEMO, "256"),
        (["--work_dir=x"], DEMO, "Unknown command line flag 'work_dir'"),
        ([], "nowhere.py:otter", "--config=nowhere.py: there is no such file"),
        (["--config.steps=3"], "nowhere.py", "--config=nowhere.py: there is no such file"),
        ([], None, "--config=NAME is missing, such as --config=photos"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(parse, arguments, config, message):
    with pytest.raises(SystemExit) as raised:
        parse(*arguments, config=config)
    line = raised.value.code
    assert line.startswith("zslflax: ") and message in line and "\n" not in line


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\ndef (", "file.py, line 2: invalid syntax"),
        (
            f"{START}c.optimizer.lerning_rate = 1.0",
            "line 4: optimizer.lerning_rate: there is no such field; nearest: op",
        ),
        (
            f"{START}c.teacher.decay = 0.9",
            "file.py, line 4: teacher.decay: there is no such field; it is called teacher.",
        ),
        (f"{START}c.batch_size = '64'", "file.py, line 4: batch_size: expected the type int, found the type str"),
        (f"{START}c.model.image = 'resnet50'", "line 4: model.image: expected a group of fields, found the type str"),
        (f"{START}c.steps = 1 // 0", "file.py, line 4: ZeroDivisionError: integer division or modulo by zero"),
        (
            f"{START}open('/no/file')",
            "file.py, line 4: FileNotFoundError: [Errno 2] No such file or directory: '/no/fi",
        ),
        ("import no_such_module", "file.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "import ml_collections as m\ndef get_config(): return m.ConfigDict({'steps': 1})",
            "the config has no field batch_size, checkpoint.every, ",
        ),
        ("def get_config(a, b): pass", "file.py: TypeError: get_config() missing 2 required positional arguments"),
        ("x = 1", "the file has no function get_config"),
        ("def get_config(): pass", "expected get_config() to return an ml_collections.ConfigDict, found None"),
    ],
)
def test_a_config_file_that_is_no_config_ends_in_one_line(parse, tmp_path, monkeypatch, text, message):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of the last config file, which has the function
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(SystemExit) as raised:
        parse("--config.steps=3", config=tmp_path / "file.py")
    assert raised.value.code.startswith("zslflax: ") and message in raised.value.code
    assert "--config" in raised.value.code and "\n" not in raised.value.code


def test_templates_from_a_file_are_saved_with_the_config(parse, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    c = parse(f"--config.eval.templates={tmp_path / 'prompts.txt'}")
    resolve_templates(c)
    assert c.eval.templates == ("a photo of a {}.", "a drawing of a {}.")


@pytest.fixture
def main_without_set_up(monkeypatch):
    """`main`, which leaves the log and jax as they are."""
    monkeypatch.setattr(main, "start_logging", lambda: None)
    monkeypatch.setattr(main.distributed, "initialize", lambda *_: None)
    return main


def test_launchers_choose_the_exit_status_of_a_stopped_run(parse, main_without_set_up, monkeypatch, tmp_path):
    for argument, complete, status in (("0", False, 0), ("143", False, 143), ("143", True, 0)):
        monkeypatch.setattr(main, "train", lambda *_, complete=complete: complete)
        parse(f"--workdir={tmp_path}", f"--stopped_status={argument}")
        assert main_without_set_up.run([]) == status


def test_a_user_error_in_a_run_ends_in_its_message_and_any_other_with_a_traceback(
    parse, main_without_set_up, monkeypatch, tmp_path
):
    def shape_bug(*_):
        return np.ones(3) + np.ones(2)

    def user_error(*_):
        raise UserError("steps is 5")

    monkeypatch.setattr(sys, "argv", ["main", f"--config={DEMO}", f"--workdir={tmp_path}"])
    monkeypatch.setattr(main, "train", shape_bug)
    with pytest.raises(ValueError, match="operands could not be broadcast") as raised:
        main_without_set_up.main()
    assert any(entry.name == "shape_bug" for entry in raised.traceback)
    reset_flags()
    monkeypatch.setattr(main, "train", user_error)
    with pytest.raises(SystemExit) as ended:
        main_without_set_up.main()
    assert ended.value.code == "zslflax: steps is 5"


def test_the_command_prints_one_line_or_the_traceback_where_that_is_asked_for(tmp_path):
    arguments = [sys.executable, "-m", "zslflax.main", f"--config={DEMO}", f"--workdir={tmp_path}", "--mode=evaluate"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    options = dict(capture_output=True, text=True, timeout=120)
    user = subprocess.run(arguments, env=environment, **options)
    assert user.returncode == 1 and "Traceback" not in user.stderr
    (line,) = [line for line in user.stderr.splitlines() if line.startswith("zslflax: ")]
    assert "has no config.json" in line and user.stderr.endswith(f"{line}\n")
    developer = subprocess.run(arguments, env={**environment, "ZSLFLAX_TRACEBACK": "1"}, **options)
    assert developer.returncode == 1 and "Traceback" in developer.stderr


PATH_FIELDS = (
    *("compilation_cache", "model.image.pretrained", "model.text.pretrained", "model.text.tokenizer", "data.exclude"),
    *("data.tfds_dir", "data.shapes.root", "teacher.workdir", "eval.class_cache", "eval.sets.test.class_names"),
    *("eval.sets.test.unseen", "eval.sets.test.synonyms", "eval.sets.test.wordnet", "eval.sets.test.classes"),
)


@pytest.mark.parametrize("field", PATH_FIELDS)
def test_an_address_in_a_path_field_is_refused_by_its_name(field):
    config = default_config()
    config.model.text.tokenizer = "somewhere"
    config.update_from_flattened_dict({field: "gs://bucket/folder"})
    with pytest.raises(UserError, match=f"config: {field} is 'gs://bucket/folder', an address; expected a path"):
        check_paths(config)


def test_a_workdir_that_is_an_address_is_refused_before_anything_starts(tmp_path):
    command = [sys.executable, "-m", "zslflax.main", f"--config={DEMO}", "--workdir=gs://bucket/run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 1 and "--workdir is 'gs://bucket/run', an address" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())
