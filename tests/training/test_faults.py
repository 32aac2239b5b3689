"""Whole runs that meet a signal, a full disk, damage or a second run, compared with an undisturbed run."""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.checkpoints import flip_arrays
from tests.testing.faults import as_nobody, give_to_nobody, small_disk
from tests.testing.runs import act_at_batch, assert_same_bits, assert_same_run, read_metrics, read_state
from zslflax import checkpoint
from zslflax.data.sources import shapes
from zslflax.errors import DeviceMemoryError, MissingFileError, NonFiniteError, StorageError, UserError
from zslflax.evaluation import zero_shot
from zslflax.inference.predictor import Predictor
from zslflax.training import initial_state, input, loop, workdir
from zslflax.training.step import TrainStep

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def undisturbed(trained_workdir):
    """The workdir of an undisturbed run of `tiny_config`."""
    return trained_workdir


def test_a_run_that_was_asked_to_stop_resumes_to_the_same_bits(tiny_config, undisturbed, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "zslflax")
    handlers = [signal.getsignal(number) for number in SIGNALS]

    # The last step is between two reports, before the first report, and one with an evaluation.
    for number, batch, step in ((signal.SIGTERM, 6, 5), (signal.SIGINT, 2, 1), (signal.SIGHUP, 4, 3)):
        folder = tmp_path / f"{number.name}{step}"
        with monkeypatch.context() as context:
            act_at_batch(context, batch, lambda: os.kill(os.getpid(), number))
            loop.train(tiny_config, folder)
        assert checkpoint.complete_steps(folder)[-1] == step
        assert f"stopped and saved at step {step} of 6; the same command continues" in caplog.text
        loop.train(tiny_config, folder)
        assert_same_run(undisturbed, folder)
    assert "SIGINT: saving after this step, then stopping; once more stops at once" in caplog.text
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_evaluation_comes_first_at_the_next_start(
    tiny_config, undisturbed, tmp_path, monkeypatch, caplog, step
):
    caplog.set_level("INFO", "zslflax")
    tiny_config.eval.best_metric = "eval/test/hit@1"
    measure_model, measured = zero_shot.measure_model, []

    def interrupted(*args):
        measured.append(args)
        if len(measured) == 2 * step // 3:  # the teacher has been measured, the student has not
            os.kill(os.getpid(), signal.SIGTERM)
        return measure_model(*args)

    folder = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(zero_shot, "measure_model", interrupted)
        loop.train(tiny_config, folder)
    assert len(measured) == 2 * step // 3 and checkpoint.complete_steps(folder)[-1] == step
    assert read_metrics(folder)[-1]["step"] < step
    assert f"stopped and saved at step {step} of 6" in caplog.text
    loop.train(tiny_config, folder)
    assert_same_run(undisturbed, folder)


def test_a_step_that_does_not_fit_into_the_memory_ends_the_run_with_what_to_change(tiny_config, tmp_path, monkeypatch):
    take_step = TrainStep.__call__

    def take_large_step(self, state, batch):
        return jnp.ones(1 << 50) if int(state.step) == 3 else take_step(self, state, batch)

    monkeypatch.setattr(TrainStep, "__call__", take_large_step)
    share = tiny_config.batch_size // jax.device_count()
    message = (
        rf"memory does not suffice \(.*\): a device embeds {share} pairs at a time. Set micro_batch={share // 2}, with "
        "which the update stays that of the whole batch; or model.image.remat=True, for a third more computation; or "
        "model.text.remat=True, .*; or a smaller batch_size$"
    )
    with pytest.raises(DeviceMemoryError, match=message):
        loop.train(tiny_config, tmp_path)
    assert checkpoint.complete_steps(tmp_path) == [3]


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: writing more fails as on a full disk, with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_early_and_the_last_checkpoint_stays(tiny_config, undisturbed, tmp_path, monkeypatch):
    tiny_config.checkpoint.every = 1  # the error of one save is met long before the end
    folder = tmp_path / "run"
    with contextlib.ExitStack() as stack, monkeypatch.context() as context:
        act_at_batch(context, 4, lambda: stack.enter_context(full_disk(1 << 20)))
        with pytest.raises(
            StorageError,
            match=r"could not be written to .*/run/checkpoints: File too large. Complete are those of steps: \d",
        ):
            loop.train(tiny_config, folder)
    step = checkpoint.complete_steps(folder)[-1]
    assert 1 <= step <= 3
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(read_state(folder, step)))
    loop.train(tiny_config, folder)
    assert_same_bits(read_state(undisturbed, 6), read_state(folder, 6))


def test_a_workdir_that_cannot_be_written_is_refused_at_once(tiny_config, tmp_path):
    (tmp_path / "folder").mkdir(mode=0o555)
    with as_nobody(), pytest.raises(StorageError, match="folder/run cannot be written: Perm") as refused:
        loop.train(tiny_config, tmp_path / "folder" / "run")
    assert isinstance(refused.value.__cause__, PermissionError)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run cannot be written: Not a directory") as refused:
        loop.train(tiny_config, tmp_path / "file" / "run")
    assert isinstance(refused.value.__cause__, NotADirectoryError)


def test_a_workdir_whose_checkpoints_cannot_be_written_is_refused_at_once(tiny_config, nobodys_folder):
    folder = nobodys_folder / "run" / "checkpoints"
    folder.mkdir(parents=True)
    give_to_nobody(nobodys_folder)
    folder.chmod(0o555)
    with as_nobody(), pytest.raises(StorageError, match=f"{folder} cannot be written: Permission denied"):
        loop.train(tiny_config, nobodys_folder / "run")
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(StorageError, match=f"{folder} cannot be written: File exists"):
        loop.train(tiny_config, nobodys_folder / "run")


def test_outputs_that_a_run_can_do_without_do_not_stop_it(tiny_config, tmp_path, caplog):
    tiny_config.profile_steps, tiny_config.steps = "2:3", 3
    for name in ("predictions", "profile"):
        (tmp_path / name).write_text("")
    loop.train(tiny_config, tmp_path)
    assert checkpoint.complete_steps(tmp_path) == [3]
    assert f"{tmp_path}/predictions/3.png cannot be written: " in caplog.text
    assert f"there is no trace in {tmp_path}/profile, and the run goes on without" in caplog.text


def test_no_run_finishes_without_its_last_step_on_the_disk(tiny_config, tmp_path, monkeypatch):
    tiny_config.eval.sets.test.data = ""
    save = checkpoint.save

    def save_and_lose(manager, state, *args, **kwargs):
        save(manager, state, *args, **kwargs)
        if int(state.step) == 6:
            manager.wait_until_finished()
            shutil.rmtree(tmp_path / "checkpoints" / "6", ignore_errors=True)

    monkeypatch.setattr(checkpoint, "save", save_and_lose)
    with pytest.raises(StorageError, match="step 6 was saved to .*/checkpoints/6, but cannot be read from there"):
        loop.train(tiny_config, tmp_path)


def test_a_run_whose_newest_checkpoint_was_renamed_or_copied_goes_on(tiny_config, undisturbed, tmp_path):
    expected, folder = read_state(undisturbed, 6), undisturbed / "checkpoints"
    (folder / "6").rename(folder / "31")
    shutil.copytree(folder / "3", folder / "999")
    loop.train(tiny_config, undisturbed)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]
    assert_same_bits(read_state(undisturbed, 6), expected)


def test_metrics_that_cannot_be_written_end_the_run_with_its_step_saved(tiny_config, undisturbed, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    with small_disk(folder / "full", "16k") as disk:
        (folder / "metrics.jsonl").symlink_to(disk / "metrics.jsonl")
        (disk / "metrics.jsonl").write_text("")
        (disk / "rest").write_bytes(bytes(16 << 10))
        with pytest.raises(StorageError, match=f"{folder}/metrics.jsonl cannot be written: No space left on device"):
            loop.train(tiny_config, folder)
    (step,) = checkpoint.complete_steps(folder)
    assert f"step {step} is saved; the same command continues from there" in caplog.text
    (folder / "metrics.jsonl").unlink()
    loop.train(tiny_config, folder)
    assert_same_bits(read_state(undisturbed, 6), read_state(folder, 6))


def test_a_truncated_shard_ends_the_run_with_its_name_and_the_last_checkpoint_stays(tiny_config, tmp_path, monkeypatch):
    c = tiny_config.data.shapes
    folder = shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).path
    shard = tmp_path / "shard.tar"
    shard.write_bytes((folder / "train-00000.tar").read_bytes())
    tiny_config.data.train, tiny_config.steps = (str(shard),), 100  # threads read some batches ahead
    act_at_batch(monkeypatch, 6, lambda: os.truncate(shard, 0))
    with pytest.raises(UserError, match=f"{shard} has been changed while it was in use"):
        loop.train(tiny_config, tmp_path / "run")
    step = checkpoint.complete_steps(tmp_path / "run")[-1]
    assert 3 <= step < 100 and int(read_state(tmp_path / "run", step)["step"]) == step


def test_the_steps_of_a_damaged_checkpoint_are_trained_again(tiny_config, undisturbed, caplog):
    expected = read_state(undisturbed, 6)
    flip_arrays(undisturbed / "checkpoints" / "6")
    before = read_metrics(undisturbed)
    loop.train(tiny_config, undisturbed)
    assert f"{undisturbed}/checkpoints/6 is damaged, moved to {undisturbed}/damaged/6" in caplog.text
    assert read_metrics(undisturbed) == before
    assert_same_bits(read_state(undisturbed, 6), expected)


def test_a_best_metric_that_no_evaluation_gives_is_refused_with_the_nearest(tiny_config, undisturbed, tmp_path):
    tiny_config.eval.best_metric, folder = "eval/test/hit@3", tmp_path / "run"
    with pytest.raises(
        UserError, match="eval.best_metric is 'eval/test/hit@3', which no evaluation gives.*eval/test/hit@"
    ):
        loop.train(tiny_config, folder)
    assert checkpoint.complete_steps(folder) == [3]  # an evaluation that fails costs no step
    tiny_config.eval.best_metric = "eval/test/hit@1"
    loop.train(tiny_config, folder)
    assert_same_run(undisturbed, folder)


def test_a_run_resumes_with_another_config_if_it_is_told_to(tiny_config, undisturbed, caplog):
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match="--changed"):
        loop.train(tiny_config, undisturbed)
    tiny_config.steps = 7
    loop.train(tiny_config, undisturbed, changed=True)
    assert checkpoint.complete_steps(undisturbed)[-1] == 7
    assert "optimizer.learning_rate: 0.01 there, 0.5 now" in caplog.text


def test_a_change_that_does_not_fit_the_checkpoint_changes_nothing(tiny_config, undisturbed):
    before = (undisturbed / "config.json").read_text()
    tiny_config.model.embed_dim = 12
    with pytest.raises(UserError, match="take back what --changed let pass"):
        loop.train(tiny_config, undisturbed, changed=True)
    assert (undisturbed / "config.json").read_text() == before
    assert Predictor.restore(undisturbed).step == 6


@pytest.mark.parametrize("changed", [False, True])
def test_a_workdir_of_an_older_version_is_refused_and_stays_as_it_is(tiny_config, undisturbed, changed):
    path = undisturbed / "config.json"
    older = json.loads(path.read_text())
    older["teacher"]["decay"], older["report_every"] = older["teacher"].pop("ema_decay"), older.pop("log_every")
    path.write_text(json.dumps(older))
    before = {entry: entry.stat().st_mtime_ns for entry in undisturbed.rglob("*") if entry.name != "lock"}
    message = (
        rf"{path} was written by an older version .*report_every \(now log_every\), teacher.decay \(now teacher.ema_dec"
    )
    with pytest.raises(UserError, match=message):
        loop.train(tiny_config, undisturbed, changed=changed)
    with pytest.raises(UserError, match=message):
        Predictor.restore(undisturbed)
    assert {entry: entry.stat().st_mtime_ns for entry in undisturbed.rglob("*") if entry.name != "lock"} == before


def test_a_second_run_in_the_same_workdir_is_refused(tiny_config, tmp_path):
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another process is training in {tmp_path}"):
            loop.train(tiny_config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_workdir_that_a_process_does_not_see_is_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.distributed, "is_main", lambda: False)
    with pytest.raises(MissingFileError, match="a file system that all hosts share"):
        workdir.write_config(tiny_config, tmp_path / "run")


def make_features_nonfinite(monkeypatch, *steps):
    """Makes a caption's features non-finite in the batches of these steps."""
    with_text_features = input.with_text_features

    def changed(batches, text_features):
        for i, batch in enumerate(with_text_features(batches, text_features), start=1):
            features = np.array(batch["text_features"])
            features[0, 0] = np.nan if i in steps else features[0, 0]
            yield batch | {"text_features": features}

    monkeypatch.setattr(input, "with_text_features", changed)


def test_nonfinite_steps_are_skipped_and_counted_up_to_a_limit(tiny_config, tmp_path, monkeypatch):
    tiny_config.freeze, tiny_config.model.text.cached_captions = (("text/tower", -1),), 100
    tiny_config.eval.sets.test.data = ""
    make_features_nonfinite(monkeypatch, 4, 5)
    with pytest.raises(NonFiniteError, match="step 4 is not finite; the state before it is saved as step 3"):
        loop.train(tiny_config, tmp_path / "stop")
    tiny_config.optimizer.max_nonfinite_steps = 1
    with pytest.raises(NonFiniteError, match="step 5 is not finite, after 1 that were skipped"):
        loop.train(tiny_config, tmp_path / "one")
    tiny_config.optimizer.max_nonfinite_steps = 2
    loop.train(tiny_config, tmp_path / "one")  # resumes with the higher limit
    assert checkpoint.complete_steps(tmp_path / "one")[-1] == 6
    loop.train(tiny_config, tmp_path / "two")
    assert [line["train/nonfinite_steps"] for line in read_metrics(tmp_path / "two")] == [0, 0, 1, 2]
    assert read_metrics(tmp_path / "two")[2]["train/loss"] is None  # of the one step since the last report
    assert np.isfinite(read_metrics(tmp_path / "two")[3]["train/loss"])


def test_what_does_not_fit_together_is_refused_before_a_state_is_made(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(initial_state, "create_train_state", None)  # would be next
    tiny_config.freeze = (("text/towr", -1),)
    with pytest.raises(UserError, match="freeze: no parameter matches 'text/towr'.*nearest: text/tower$"):
        loop.train(tiny_config, tmp_path / "a")
    tiny_config.freeze, tiny_config.model.text.max_tokens = (), 600
    with pytest.raises(UserError, match="model.text.max_tokens is 600, but the encoder in .* takes 512"):
        loop.train(tiny_config, tmp_path / "b")
    tiny_config.model.text.max_tokens, tiny_config.model.text.scratch.vocab_size = 12, 30_000
    with pytest.raises(UserError, match="ids up to 30521, but the text tower's table has 30000 rows.*vocab_size=30522"):
        loop.train(tiny_config, tmp_path / "c")
    tiny_config.model.text.scratch.vocab_size, tiny_config.model.image.name = 30_522, "vit_b61"
    with pytest.raises(UserError, match="model.image.name is 'vit_b61'.*nearest: vit_b16"):
        loop.train(tiny_config, tmp_path / "d")
