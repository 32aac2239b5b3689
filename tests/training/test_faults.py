"""Whole runs that meet a signal, a full disk, damage or a second run, against one that met nothing."""

import contextlib
import fcntl
import os
import resource
import signal

import jax
import numpy as np
import pytest

from tests.test_checkpoint import reads_damage, unfinished_reads  # noqa: F401, the second is its fixture
from tests.training.test_loop import assert_same_bits, lines, saved
from zslflax.data import pipeline
from zslflax.data.sources import shapes
from zslflax.evaluation import zero_shot
from zslflax.inference.predictor import Predictor
from zslflax.training import checkpoint, input, loop


def at_batch(monkeypatch, number, action):
    """`action` happens as the batch of a step is made: during the step before, for two are on their way."""
    batches = pipeline.train_batches

    def acting(*args, start_step=0, **kwargs):
        for i, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start=start_step + 1):
            if i == number:
                action()
            yield batch

    monkeypatch.setattr(pairs, "train_batches", acting)


def assert_same_run(whole, workdir):
    assert lines(whole) == lines(workdir)
    steps = [checkpoint.available(folder) for folder in (whole, workdir)]
    assert steps[0][-1] == steps[1][-1]
    for step in set(steps[0]) & set(steps[1]):  # where it was stopped, one more was saved, and an older one went
        assert_same_bits(saved(whole, step), saved(workdir, step))


@pytest.fixture
def whole(workdir):
    """A run that met nothing."""
    return workdir


def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_bits(tiny, whole, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "zslflax")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    for number, batch, step in ((signal.SIGTERM, 6, 5), (signal.SIGINT, 2, 1), (signal.SIGTERM, 4, 3)):
        parts = tmp_path / f"{number.name}{step}"
        with monkeypatch.context() as context:
            at_batch(context, batch, lambda: os.kill(os.getpid(), number))
            loop.train(tiny, parts)
        assert checkpoint.available(parts)[-1] == step  # between two reports, before the first, and at an evaluation
        assert f"stopped and saved at step {step} of 6; the same command goes on" in caplog.text
        loop.train(tiny, parts)
        assert_same_run(whole, parts)
    assert "SIGINT: saving after this step, then stopping; once more stops at once" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("step", [3, 6])
def test_an_evaluation_is_broken_off_and_comes_first_at_the_next_start(
    tiny, whole, tmp_path, monkeypatch, caplog, step
):
    caplog.set_level("INFO", "zslflax")
    tiny.eval.best_metric = "eval/test/hit@1"
    measure_model, measured = zero_shot.measure_model, []

    def interrupted(*args):
        measured.append(args)
        if len(measured) == 2 * step // 3:  # the teacher has been measured, the student has not
            os.kill(os.getpid(), signal.SIGTERM)
        return measure_model(*args)

    with monkeypatch.context() as context:
        context.setattr(zero_shot, "measure_model", interrupted)
        loop.train(tiny, tmp_path / "parts")
    assert len(measured) == 2 * step // 3 and checkpoint.available(tmp_path / "parts")[-1] == step
    assert lines(tmp_path / "parts")[-1]["step"] < step
    assert f"stopped and saved at step {step} of 6" in caplog.text
    loop.train(tiny, tmp_path / "parts")
    assert_same_run(whole, tmp_path / "parts")


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: writing more fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@reads_damage
def test_a_full_disk_ends_the_run_in_time_and_the_last_checkpoint_stays(tiny, whole, tmp_path, monkeypatch):
    tiny.checkpoint.every = 1  # so that an error of one save is met long before the end
    parts = tmp_path / "parts"
    with contextlib.ExitStack() as stack, monkeypatch.context() as context:
        at_batch(context, 4, lambda: stack.enter_context(full_disk(1 << 20)))
        with pytest.raises(
            OSError, match=r"could not be written to .*/parts/checkpoints; whole are those of steps: \d"
        ):
            loop.train(tiny, parts)
    step = checkpoint.available(parts)[-1]
    assert 1 <= step <= 3
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(saved(parts, step)))
    loop.train(tiny, parts)
    assert_same_bits(saved(whole, 6), saved(parts, 6))


@contextlib.contextmanager
def no_permission():
    """As somebody who may not write here, where the tests run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_workdir_that_cannot_be_written_is_refused_at_once(tiny, tmp_path):
    (tmp_path / "folder").mkdir(mode=0o555)
    with no_permission(), pytest.raises(PermissionError, match="folder/run"):
        loop.train(tiny, tmp_path / "folder" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file/run"):
        loop.train(tiny, tmp_path / "file" / "run")


def test_a_shard_that_is_cut_off_ends_the_run_with_its_name_and_the_last_checkpoint_stays(tiny, tmp_path, monkeypatch):
    c = tiny.data.shapes
    folder = shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).path
    shard = tmp_path / "shard.tar"
    shard.write_bytes((folder / "train-00000.tar").read_bytes())
    tiny.data.train, tiny.steps = (str(shard),), 100  # threads read some batches ahead
    at_batch(monkeypatch, 6, lambda: os.truncate(shard, 0))
    with pytest.raises(ValueError, match=f"{shard} has been changed while it was in use"):
        loop.train(tiny, tmp_path / "run")
    step = checkpoint.available(tmp_path / "run")[-1]
    assert 3 <= step < 100 and int(saved(tmp_path / "run", step)["step"]) == step


@reads_damage
def test_a_damaged_checkpoint_is_trained_again(tiny, whole, tmp_path, caplog):
    expected = saved(whole, 6)
    for path in (whole / "checkpoints" / "6" / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    before = lines(whole)
    loop.train(tiny, whole)
    assert f"{whole}/checkpoints/6 is damaged, moved to {whole}/damaged/6" in caplog.text
    assert lines(whole) == before
    assert_same_bits(saved(whole, 6), expected)


def test_a_metric_to_be_best_by_that_no_evaluation_gives_is_named_with_the_nearest(tiny, whole, tmp_path):
    tiny.eval.best_metric, run = "eval/test/hit@3", tmp_path / "run"
    with pytest.raises(
        ValueError, match="eval.best_metric is 'eval/test/hit@3', which no evaluation gives.*eval/test/hit@"
    ):
        loop.train(tiny, run)
    assert checkpoint.available(run) == [3]  # an evaluation that fails costs no step
    tiny.eval.best_metric = "eval/test/hit@1"
    loop.train(tiny, run)
    assert_same_run(whole, run)


def test_another_config_goes_on_when_told(tiny, whole, caplog):
    tiny.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match="--changed"):
        loop.train(tiny, whole)
    tiny.steps = 7
    loop.train(tiny, whole, changed=True)
    assert checkpoint.available(whole)[-1] == 7 and "optimizer.learning_rate: 0.01 there, 0.5 now" in caplog.text


@reads_damage  # what does not fit is read in vain as well
def test_a_change_that_does_not_fit_the_checkpoint_changes_nothing(tiny, whole):
    before = (whole / "config.json").read_text()
    tiny.model.embed_dim = 12
    with pytest.raises(ValueError, match="take back what --changed let pass"):
        loop.train(tiny, whole, changed=True)
    assert (whole / "config.json").read_text() == before
    assert Predictor.restore(whole).step == 6


def test_a_second_run_in_the_same_workdir_is_refused(tiny, tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"another process is training in {tmp_path}"):
            loop.train(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def plant(monkeypatch, *steps):
    """Features of captions that are not finite, in the batches of these steps."""
    made = input.with_text_features

    def planted(batches, text_features):
        for i, batch in enumerate(made(batches, text_features), start=1):
            features = np.array(batch["text_features"])
            features[0, 0] = np.nan if i in steps else features[0, 0]
            yield batch | {"text_features": features}

    monkeypatch.setattr(feed, "with_text_features", planted)


def test_steps_that_are_not_finite_are_dropped_and_counted_up_to_a_number(tiny, tmp_path, monkeypatch):
    tiny.freeze, tiny.model.text.cached_captions, tiny.eval.sets.test.data = (("text/tower", -1),), 100, ""
    plant(monkeypatch, 4, 5)
    with pytest.raises(FloatingPointError, match="step 4 is not finite; the state before it is saved as step 3"):
        loop.train(tiny, tmp_path / "stop")
    tiny.optimizer.max_nonfinite_steps = 1
    with pytest.raises(FloatingPointError, match="step 5 is not finite, after 1 that were dropped"):
        loop.train(tiny, tmp_path / "one")
    tiny.optimizer.max_nonfinite_steps = 2
    loop.train(tiny, tmp_path / "one")  # goes on with it
    assert checkpoint.available(tmp_path / "one")[-1] == 6
    loop.train(tiny, tmp_path / "two")
    assert [line["train/nonfinite_steps"] for line in lines(tmp_path / "two")] == [0, 0, 1, 2]
    assert lines(tmp_path / "two")[2]["train/loss"] is None  # of the one step since the last report
    assert np.isfinite(lines(tmp_path / "two")[3]["train/loss"])


def test_what_does_not_fit_together_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.states, "create", None)  # would be next
    tiny.freeze = (("text/towr", -1),)
    with pytest.raises(ValueError, match="freeze: no parameter matches 'text/towr'.*nearest: text/tower$"):
        loop.train(tiny, tmp_path / "a")
    tiny.freeze, tiny.model.text.max_tokens = (), 600
    with pytest.raises(ValueError, match="model.text.max_tokens is 600, but the encoder in .* takes 512"):
        loop.train(tiny, tmp_path / "b")
    tiny.model.text.max_tokens, tiny.model.text.scratch.vocab_size = 12, 30_000
    with pytest.raises(
        ValueError, match="ids up to 30521, but the text tower's table has 30000 rows.*vocab_size=30522"
    ):
        loop.train(tiny, tmp_path / "c")
    tiny.model.text.scratch.vocab_size, tiny.model.image.name = 30_522, "vit_b61"
    with pytest.raises(ValueError, match="model.image.name is 'vit_b61'.*nearest: vit_b16"):
        loop.train(tiny, tmp_path / "d")
