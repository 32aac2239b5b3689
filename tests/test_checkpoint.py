"""Checkpoints: which are kept, what is restored from them on any number of devices, and how damage is noticed."""

import os
import random
import shutil
import subprocess
import sys
import threading

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.checkpoints import damage, save_steps, state_at
from tests.testing.configs import process_environment
from tests.testing.faults import as_nobody, give_to_nobody, small_disk
from zslflax import checkpoint, checkpoint_checks, checkpoint_recovery, distributed
from zslflax.errors import StorageError, UserError


@pytest.mark.parametrize("name", ["v[2]", "a]b", "a\\b"])
def test_a_path_whose_checkpoints_could_never_be_restored_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read again"):
        checkpoint.create_manager(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_the_newest_two_are_kept(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4])
    assert checkpoint.complete_steps(tmp_path) == [3, 4]


def test_the_best_is_kept_too_and_a_run_resumes_from_the_newest(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4, 5], "eval/hit", {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4})
    assert checkpoint.complete_steps(tmp_path) == [2, 4, 5]
    with checkpoint.open_manager(tmp_path, "eval/hit") as manager:
        assert manager.latest_step() == 5
        jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(manager, state_at(0)), state_at(5))


def test_steps_without_an_evaluation_are_never_the_best(tmp_path):
    with checkpoint.open_manager(tmp_path, "eval/hit") as manager:
        for step in range(1, 6):
            checkpoint.save(manager, state_at(step), {"eval/hit": 1.0 - step / 10} if step % 2 else None)
    assert checkpoint.complete_steps(tmp_path) == [1, 4, 5]


def test_the_best_metric_can_change_when_a_run_resumes(tmp_path):
    save_steps(tmp_path, [1, 2], "eval/hit", {1: 0.9, 2: 0.1})
    with checkpoint.open_manager(tmp_path, "eval/other") as manager:
        for step, value in ((3, 0.5), (4, 0.2), (5, 0.1)):
            checkpoint.save(manager, state_at(step), {"eval/other": value})
    assert checkpoint.complete_steps(tmp_path) == [3, 4, 5]


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.complete_steps(tmp_path) == [1]
    with checkpoint.open_manager(tmp_path) as manager:
        assert manager.latest_step() == 1


@flax.struct.dataclass
class Counters:
    """A state of another kind: checkpoints need nothing but `step` and trees of arrays."""

    step: jax.Array
    counts: dict[str, jax.Array]


def test_any_state_with_a_step_can_be_saved(tmp_path):
    state = distributed.replicate(Counters(jnp.int32(2), {"a": jnp.arange(3), "b": jnp.ones((2, 2))}))
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state)
        checkpoint.wait_until_finished(manager)
        restored = checkpoint.restore(manager, jax.tree.map(jnp.zeros_like, state))
    assert isinstance(restored, Counters)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


RESTORE = """
import sys, json, jax
import numpy as np
from tests.testing.checkpoints import state_at
from zslflax import checkpoint
assert jax.device_count() == int(sys.argv[2])
with checkpoint.open_manager(sys.argv[1]) as manager:
    restored = checkpoint.restore(manager, state_at(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(7))
    parts = checkpoint.restore_parts(sys.argv[1], 7, ("teacher_params", "batch_stats"))
    jax.tree.map(np.testing.assert_array_equal, parts["teacher_params"], state_at(7).teacher_params)
    assert parts["batch_stats"] == {} and isinstance(jax.tree.leaves(parts)[0], np.ndarray)
    checkpoint.save(manager, restored.replace(step=restored.step + 1))
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_checkpoint_of_four_devices_is_read_by_other_numbers_and_back(tmp_path, devices):
    save_steps(tmp_path, [7])
    environment = process_environment(JAX_NUM_CPU_DEVICES=devices)
    arguments = [sys.executable, "-c", RESTORE, str(tmp_path), str(devices)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with checkpoint.open_manager(tmp_path) as manager:
        restored = checkpoint.restore(manager, state_at(0))
    assert int(restored.step) == 8 and restored.step.sharding.num_devices == 4
    jax.tree.map(np.testing.assert_array_equal, restored.params, state_at(7).params)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A workdir with the checkpoints of steps 1 and 2. Tests must not change it."""
    folder = tmp_path_factory.mktemp("two")
    save_steps(folder, [1, 2])
    return folder


@pytest.fixture
def workdir_copy(two_checkpoints, tmp_path):
    return shutil.copytree(two_checkpoints, tmp_path / "copy")


def test_some_attributes_are_read_alone_and_without_a_warning(two_checkpoints, caplog):
    parts = checkpoint.restore_parts(two_checkpoints, 2, ("params", "step", "batch_stats"))
    expected = state_at(2)
    for name, part in parts.items():
        jax.tree.map(np.testing.assert_array_equal, part, getattr(expected, name))
    assert set(parts) == {"params", "step", "batch_stats"} and not caplog.records


def restore_newest(folder, like=None):
    with checkpoint.open_manager(folder) as manager:
        return checkpoint_recovery.restore_newest(manager, like or state_at(0)), list(manager.all_steps())


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
def test_damage_to_any_file_leads_to_a_state_that_was_saved(two_checkpoints, tmp_path, caplog, kind):
    files = [path.relative_to(two_checkpoints) for path in (two_checkpoints / "checkpoints" / "2").rglob("*")]
    noticed = set()
    for i, name in enumerate(name for name in files if (two_checkpoints / name).is_file()):
        folder = tmp_path / str(i)
        shutil.copytree(two_checkpoints, folder)
        damage(folder / name, kind)
        caplog.clear()
        state, steps = restore_newest(folder)
        jax.tree.map(np.testing.assert_array_equal, state, state_at(int(state.step)))
        if int(state.step) == 1:
            noticed.add(name.name)
            assert f"{folder / 'checkpoints' / '2'} is damaged, moved to {folder / 'damaged' / '2'}" in caplog.text
            assert steps == [1] and (folder / "damaged" / "2" / name.relative_to("checkpoints/2")).exists()
        else:
            assert steps == [1, 2] and not (folder / "damaged").exists()
    assert {"manifest.ocdbt", "metadata"} <= noticed


def test_no_flipped_bit_of_the_arrays_goes_unnoticed(tmp_path):
    """Orbax's own checks let some pass. Where the arrays are read as they were saved, the bit has no meaning."""
    kernel = jax.random.normal(jax.random.key(0), (100, 100))
    saved = state_at(2)
    saved = saved.replace(batch_stats=distributed.replicate({"kernel": kernel}))
    manager = checkpoint.create_manager(tmp_path)
    checkpoint.save(manager, saved)
    manager.wait_until_finished()
    arrays = max((tmp_path / "checkpoints" / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole, outcomes = arrays.read_bytes(), set()
    for bit in random.Random(0).sample(range(8 * len(whole)), 20):
        damage(arrays, "flipped", bit)
        try:
            state = checkpoint.restore(manager, saved, 2)
        except Exception as error:
            outcomes.add("fingerprint" if "differ from what was saved" in str(error) else "library")
        else:
            jax.tree.map(np.testing.assert_array_equal, state, saved)
        arrays.write_bytes(whole)
    manager.close()
    assert "fingerprint" in outcomes


def test_a_fingerprint_changes_with_every_bit_and_not_with_the_form_of_the_tree():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((5, 7), np.float32), np.arange(9, dtype=np.int32), rng.random(3) < 0.5]
    whole = checkpoint_checks.fingerprints({"a": arrays})["a"]
    words = [x.view(np.uint8 if x.dtype == bool else np.uint32).ravel().astype(object) for x in arrays]
    assert whole == sum((2 * i + 1) * int(word) for x in words for i, word in enumerate(x)) % 2**32
    assert checkpoint_checks.fingerprints({"a": {"x": arrays[2], "y": tuple(arrays[:2])}}) == {"a": whole}
    assert checkpoint_checks.fingerprints({"a": list(map(jnp.asarray, arrays))}) == {"a": whole}  # on a device
    for i in range(40):
        changed = [x.copy() for x in arrays[:2]]
        words = changed[i % 2].view(np.uint32).reshape(-1)
        words[rng.integers(words.size)] ^= np.uint32(1 << rng.integers(32))
        assert checkpoint_checks.fingerprints({"a": [*changed, arrays[2]]})["a"] != whole


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_moved_where_all_checkpoints_are_damaged(workdir_copy):
    for step in "12":
        damage(workdir_copy / "checkpoints" / step / "run" / "metadata", "truncated")
    before = modification_times(workdir_copy)
    with pytest.raises(
        UserError, match=r"(?s)none of the checkpoints in .* can be restored; nothing has been changed.*2: .*1: "
    ):
        restore_newest(workdir_copy)
    assert modification_times(workdir_copy) == before
    with pytest.raises(UserError, match=r"the checkpoint .*/checkpoints/2 cannot be read: /.*/run/metadata is not"):
        checkpoint.restore_parts(workdir_copy, 2, ("params",))


@flax.struct.dataclass
class OlderState:
    """A state whose attributes and parameters have other names than those of `TrainState`."""

    step: jax.Array
    params: dict
    taught: dict


def test_checkpoints_of_an_older_version_are_named_and_not_moved(tmp_path):
    params = state_at(0).params
    older = {"image": params["image"], "text": params["text"], "objective": {"log_scale": jnp.float32(3.9)}}
    with checkpoint.open_manager(tmp_path) as manager:
        for step in (1, 2):
            checkpoint.save(manager, distributed.replicate(OlderState(jnp.int32(step), older, params["image"])))
    before = modification_times(tmp_path)
    with pytest.raises(UserError) as raised:
        restore_newest(tmp_path)
    message = str(raised.value)
    assert f"{tmp_path / 'checkpoints' / '2'} was written by an older version of zslflax" in message
    assert "only the checkpoint has params/objective/log_scale, taught; only this run has failed_step, " in message
    assert "nonfinite_steps, opt_state, params/objective/log_logit_scale, teacher_params" in message
    assert "Choose another --workdir, use the version that wrote it" in message
    assert modification_times(tmp_path) == before and not (tmp_path / "damaged").exists()


def test_a_checkpoint_of_other_shapes_is_named_and_not_moved(workdir_copy):
    like = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 5)) if x.ndim else x, state_at(0))
    before = modification_times(workdir_copy)
    with pytest.raises(UserError, match=r"shapes differ for .*params/image/projection/kernel \(4, 3\) and \(4, 5\)"):
        restore_newest(workdir_copy, like)
    assert modification_times(workdir_copy) == before


def test_a_folder_that_holds_no_checkpoint_is_moved(workdir_copy):
    (workdir_copy / "checkpoints" / "7").mkdir()
    state, steps = restore_newest(workdir_copy)
    assert int(state.step) == 2 and steps == [1, 2]
    assert (workdir_copy / "damaged" / "7").is_dir()


def test_a_copy_of_a_checkpoint_is_moved_and_the_next_steps_are_saved(workdir_copy, caplog):
    folder = workdir_copy / "checkpoints"
    for name in ("999", "9" * 30):
        shutil.copytree(folder / "2", folder / name)
    with pytest.raises(UserError, match="999 holds step 2; it was copied or renamed. Rename it to 2, or remove it"):
        checkpoint.restore_parts(workdir_copy, 999, ("params",))
    with checkpoint.open_manager(workdir_copy) as manager:
        with pytest.raises(StorageError, match=r"step 3 is not saved where later steps are: \[1, 2, 999, 9+\]"):
            checkpoint.save(manager, state_at(3))
        assert int(checkpoint_recovery.restore_newest(manager, state_at(0)).step) == 2
        checkpoint.save(manager, state_at(3))
    assert checkpoint.complete_steps(workdir_copy) == [2, 3]
    assert f"{folder}/999 is a copy of step 2, moved to {workdir_copy}/damaged/999, and not used" in caplog.text


def test_a_checkpoint_that_was_renamed_gets_its_name_back(workdir_copy, caplog):
    folder = workdir_copy / "checkpoints"
    (folder / "2").rename(folder / "31")
    state, steps = restore_newest(workdir_copy)
    assert int(state.step) == 2 and steps == [1, 2]
    assert checkpoint.recent_metrics(workdir_copy, 2) == []
    assert f"{folder}/31 holds step 2 and has been renamed to it" in caplog.text


@pytest.mark.parametrize("target", ["2", "../elsewhere"])
def test_a_linked_checkpoint_is_refused_and_stays(workdir_copy, target):
    folder = workdir_copy / "checkpoints"
    shutil.copytree(folder / "2", workdir_copy / "elsewhere")
    (folder / "5").symlink_to(target)
    with pytest.raises(UserError, match="/5 is a symbolic link; replace it by the folder to which it leads, or remove"):
        restore_newest(workdir_copy)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "5"]


def test_names_that_are_no_steps_are_left_alone(workdir_copy):
    folder = workdir_copy / "checkpoints"
    names = ["2 (copy)", "2.bak", "0002", "-2"]
    for name in names:
        shutil.copytree(folder / "2", folder / name)
    (folder / "5").write_text("")
    assert checkpoint.complete_steps(workdir_copy) == [1, 2]
    with checkpoint.open_manager(workdir_copy) as manager:
        assert int(checkpoint_recovery.restore_newest(manager, state_at(0)).step) == 2
        for step in (3, 4, 5):
            checkpoint.save(manager, state_at(step))
    assert checkpoint.complete_steps(workdir_copy) == [4, 5]
    assert set(names) <= {path.name for path in folder.iterdir()}


def test_a_checkpoint_without_permission_is_not_used_and_one_that_cannot_be_moved_is_named(
    two_checkpoints, nobodys_folder, caplog
):
    workdir = shutil.copytree(two_checkpoints, nobodys_folder / "run")
    give_to_nobody(workdir)
    damaged = workdir / "checkpoints" / "2"
    (damaged / "run" / "metadata").chmod(0)
    damaged.chmod(0o555)  # a folder that is not writable cannot be moved to another
    with as_nobody():
        with pytest.raises(StorageError, match=f"{workdir}/damaged/2 cannot be written: Permission denied"):
            restore_newest(workdir)
        damaged.chmod(0o755)
        state, steps = restore_newest(workdir)
    assert int(state.step) == 1 and steps == [1]
    assert "checkpoints/2 is damaged, moved to" in caplog.text and "Permission denied" in caplog.text


def test_damage_is_moved_to_another_file_system(two_checkpoints, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        shutil.copytree(two_checkpoints / "checkpoints", disk / "checkpoints")
        (disk / "checkpoints" / "7").mkdir()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(disk / "checkpoints")
        state, steps = restore_newest(tmp_path / "run")
        assert int(state.step) == 2 and steps == [1, 2]
        assert (tmp_path / "run" / "damaged" / "7").is_dir()


SAVES = """
import sys
from pathlib import Path
import jax.numpy as jnp
from tests.testing.checkpoints import state_at
from zslflax import checkpoint, cli, distributed
cli.start_logging()
with cli.exit_on_error(), checkpoint.open_manager(Path(sys.argv[1])) as manager:
    many = {str(i): jnp.arange(1000.0) * i for i in range(200)}
    checkpoint.save(manager, state_at(2))
    checkpoint.save(manager, state_at(3).replace(teacher_params=distributed.replicate(many)))
    checkpoint.wait_until_finished(manager)
"""


def test_a_full_disk_is_one_line_to_the_user(tmp_path):
    environment = process_environment()
    with small_disk(tmp_path / "disk", "300k") as disk:
        command = [sys.executable, "-c", SAVES, str(disk)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr == (
        f"zslflax: a checkpoint could not be written to {disk}/checkpoints: No space left on device. "
        "Complete are those of steps: 2; when the cause is removed, the same command continues\n"
    )


RESTORES = """
import sys
from pathlib import Path
from tests.testing.checkpoints import state_at
from zslflax import checkpoint, checkpoint_recovery, cli
cli.start_logging()
with cli.exit_on_error(), checkpoint.open_manager(Path(sys.argv[1])) as manager:
    checkpoint_recovery.restore_newest(manager, state_at(0))
"""


def test_where_all_checkpoints_are_damaged_only_their_reasons_are_printed(workdir_copy):
    folder = workdir_copy / "checkpoints"
    newest, *earlier = sorted(folder.iterdir(), reverse=True)
    for path in (path for place in earlier for path in place.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()  # of which Orbax would warn
    damage((newest / "run" / "metadata"), "empty")
    environment = process_environment()
    command = [sys.executable, "-c", RESTORES, str(workdir_copy)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    first, *reasons = ended.stderr.splitlines()
    assert ended.returncode == 1 and first.startswith(f"zslflax: none of the checkpoints in {folder} can be restored;")
    assert reasons == [
        f"  {newest.name}: {newest}/run/metadata is not valid JSON: Expecting value: line 1 column 1 (char 0)",
        *(
            f"  {place.name}: FileNotFoundError: Metadata file (named _METADATA) does not exist at {place}/state."
            for place in earlier
        ),
    ]


def test_a_file_in_place_of_the_folder_for_damaged_checkpoints_is_named(workdir_copy):
    (workdir_copy / "checkpoints" / "7").mkdir()
    (workdir_copy / "damaged").write_text("")
    with pytest.raises(StorageError, match=f"{workdir_copy}/damaged/7 cannot be written: .*exists"):
        restore_newest(workdir_copy)


def test_a_save_that_leaves_nothing_is_an_error(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state_at(1))
        manager.wait_until_finished()
        shutil.rmtree(tmp_path / "checkpoints" / "1")
        with pytest.raises(StorageError, match="step 1 was saved to .*/checkpoints/1, but cannot be read from there"):
            checkpoint.check_for_errors(manager)


def test_arrays_of_the_first_save_are_read_again(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state_at(1))
        manager.wait_until_finished()
        for path in (tmp_path / "checkpoints" / "1" / "state").rglob("d/*"):
            path.unlink()
        with pytest.raises(StorageError, match="step 1 was saved to .* but cannot be read from there"):
            checkpoint.check_for_errors(manager)
        checkpoint.save(manager, state_at(2))
        checkpoint.wait_until_finished(manager)
    assert checkpoint.small_attributes(state_at(1)) == ["step", "teacher_params"]


def test_the_metrics_since_the_last_report_are_saved_with_the_state(tmp_path):
    values = np.random.default_rng(0).standard_normal(3, np.float32)
    recent = [{"loss": jnp.asarray(value), "failed_step": jnp.int32(-1)} for value in values] + [
        {"loss": np.float32("nan"), "failed_step": np.int32(5)}
    ]
    with checkpoint.open_manager(tmp_path, "eval/hit") as manager:
        checkpoint.save(manager, state_at(3), recent_metrics=recent)
        manager.wait_until_finished()
        restored = checkpoint.recent_metrics(tmp_path, 3)
        np.testing.assert_array_equal([m["loss"] for m in restored], [*values, np.nan])
        assert [m["failed_step"] for m in restored] == [-1, -1, -1, 5]
        assert restored[0]["loss"].dtype == np.float32 and restored[0]["failed_step"].dtype == np.int32
        # The same step after its evaluation is kept as the best, and has nothing left to report.
        checkpoint.save(manager, state_at(3), {"eval/hit": 0.9})
        for step in (4, 5, 6):
            checkpoint.save(manager, state_at(step), {"eval/hit": 0.1})
    assert checkpoint.complete_steps(tmp_path) == [3, 5, 6] and checkpoint.recent_metrics(tmp_path, 3) == []


def test_no_flipped_bit_of_the_metrics_since_the_last_report_goes_unnoticed(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state_at(2))
        checkpoint.save(manager, state_at(3), recent_metrics=[{"loss": np.float32(5.45)}])
    path = tmp_path / checkpoint.FOLDER / "3" / "run" / "metadata"
    good = path.read_bytes()
    assert checkpoint.recent_metrics(tmp_path, 3)[0]["loss"] == np.float32(5.45)
    for bit in random.Random(0).sample(range(8 * len(good)), 200):
        damage(path, "flipped", bit)
        with pytest.raises(UserError, match="metadata"):
            checkpoint.recent_metrics(tmp_path, 3)
        path.write_bytes(good)
    path.write_bytes(good.replace(b"5.4", b"3.4"))
    with checkpoint.open_manager(tmp_path) as manager:
        assert checkpoint_recovery.restore_newest(manager, state_at(0)).step == 2
    assert (tmp_path / checkpoint_recovery.DAMAGED_FOLDER / "3").is_dir()


def failing_close(monkeypatch, manager, error):
    """Makes `manager.close` raise; returns the true one."""
    close = manager.close

    def fail():
        raise error

    monkeypatch.setattr(manager, "close", fail)
    return close


def test_a_save_that_fails_as_a_run_ends_does_not_replace_the_error_of_the_run(tmp_path, monkeypatch, caplog):
    with pytest.raises(KeyError, match="of the run"), checkpoint.open_manager(tmp_path) as manager:
        close = failing_close(monkeypatch, manager, ValueError("RESOURCE_EXHAUSTED"))
        raise KeyError("of the run")
    close()
    assert "could not be written to" in caplog.text and "RESOURCE_EXHAUSTED" in caplog.text


def test_a_save_that_never_ends_does_not_keep_a_run_that_has_failed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "CLOSE_SECONDS", 0.1)
    ended = threading.Event()
    with pytest.raises(KeyError, match="of the run"), checkpoint.open_manager(tmp_path) as manager:
        close = manager.close
        monkeypatch.setattr(manager, "close", ended.wait)
        raise KeyError("of the run")
    ended.set()
    close()
    assert "the save in progress has not ended within 0 s and is given up" in caplog.text


def test_only_errors_of_storage_become_a_storage_error(tmp_path, monkeypatch):
    for raised, expected in ((ValueError("RESOURCE_EXHAUSTED"), StorageError), (TypeError("a bug"), TypeError)):
        with pytest.raises(expected, match=str(raised)), checkpoint.open_manager(tmp_path) as manager:
            close = failing_close(monkeypatch, manager, raised)
        close()


def test_a_path_that_is_no_text_in_utf_8_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / os.fsdecode(b"w\xf6rk")  # in Latin-1, or UTF-8 as Python's C locale reads it
    with pytest.raises(UserError, match=r"w\\xf6rk', which is no text in UTF-8 here; set LC_ALL=C.UTF-8"):
        checkpoint.create_manager(path)
    assert not any(tmp_path.iterdir())
