"""Checkpoints: which are kept, and that they do not know how many devices wrote them."""

import gc
import json
import os
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zslflax import distributed
from zslflax.training import checkpoint, train_state


def state_at(step):
    leaf = lambda seed: {"kernel": jax.random.normal(jax.random.key(seed), (4, 3))}
    params = {m: {"tower": leaf(i), "projection": leaf(i + 2)} for i, m in enumerate(("image", "text"))}
    params["objective"] = {"log_logit_scale": jnp.float32(step)}
    state = train_state.create({"params": params, "batch_stats": {}}, optax.adam(0.1), ema=True, frozen=())
    return distributed.replicate(state.replace(step=jnp.int32(step)))


def write(folder, steps, best="", metrics=None):
    manager = checkpoint.manager(folder, best)
    for step in steps:
        checkpoint.save(manager, state_at(step), None if metrics is None else {"eval/hit": metrics[step]})
    manager.wait_until_finished()
    manager.close()


def test_the_newest_two_are_kept(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    assert checkpoint.available(tmp_path) == [3, 4]


def test_the_best_is_kept_beside_the_newest_and_a_run_resumes_from_the_newest(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5], "eval/hit", {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4})
    assert checkpoint.available(tmp_path) == [2, 4, 5]
    manager = checkpoint.manager(tmp_path, "eval/hit")
    assert manager.latest_step() == 5
    restored = checkpoint.restore(manager, state_at(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(5))
    manager.close()


def test_steps_saved_without_an_evaluation_are_kept_by_their_age_alone(tmp_path):
    manager = checkpoint.manager(tmp_path, "eval/hit")
    for step in range(1, 6):
        checkpoint.save(manager, state_at(step), {"eval/hit": 1.0 - step / 10} if step % 2 else None)
    manager.wait_until_finished()
    manager.close()
    assert checkpoint.available(tmp_path) == [1, 4, 5]


def test_the_best_may_become_so_by_another_metric(tmp_path):
    write(tmp_path, [1, 2], "eval/hit", {1: 0.9, 2: 0.1})
    manager = checkpoint.manager(tmp_path, "eval/other")
    for step, value in ((3, 0.5), (4, 0.2), (5, 0.1)):
        checkpoint.save(manager, state_at(step), {"eval/other": value})
    manager.wait_until_finished()
    manager.close()
    assert checkpoint.available(tmp_path) == [3, 4, 5]


def test_what_was_not_finished_is_no_checkpoint(tmp_path):
    write(tmp_path, [1])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.available(tmp_path) == [1]
    manager = checkpoint.manager(tmp_path)
    assert manager.latest_step() == 1
    manager.close()


RESTORE = """
import sys, json, jax
import numpy as np
from tests.test_checkpoint import state_at
from zslflax import checkpoint
assert jax.device_count() == int(sys.argv[2])
manager = checkpoint.manager(sys.argv[1])
restored = checkpoint.restore(manager, state_at(0))
jax.tree.map(np.testing.assert_array_equal, restored, state_at(7))
parts = checkpoint.restore_parts(sys.argv[1], 7, ("teacher_params", "batch_stats"))
jax.tree.map(np.testing.assert_array_equal, parts["teacher_params"], state_at(7).teacher_params)
assert parts["batch_stats"] == {} and isinstance(jax.tree.leaves(parts)[0], np.ndarray)
checkpoint.save(manager, restored.replace(step=restored.step + 1))
manager.wait_until_finished()
manager.close()
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_written_by_four_devices_read_by_others_and_back(tmp_path, devices):
    write(tmp_path, [7])
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    arguments = [sys.executable, "-c", RESTORE, str(tmp_path), str(devices)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    manager = checkpoint.manager(tmp_path)
    restored = checkpoint.restore(manager, state_at(0))
    manager.close()
    assert int(restored.step) == 8 and restored.step.sharding.num_devices == 4
    jax.tree.map(np.testing.assert_array_equal, restored.params, state_at(7).params)


def damage(path, kind, at=None):
    data = bytearray(path.read_bytes())
    if kind == "flipped" and data:
        bit = random.Random(path.name).randrange(8 * len(data)) if at is None else at
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes({"flipped": data, "truncated": data[: len(data) // 2], "empty": b""}[kind])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write(folder, [1, 2])
    return folder


def test_parts_are_read_alone_and_without_a_warning(two, caplog):
    parts = checkpoint.restore_parts(two, 2, ("params", "step", "batch_stats"))
    expected = state_at(2)
    for name, part in parts.items():
        jax.tree.map(np.testing.assert_array_equal, part, getattr(expected, name))
    assert set(parts) == {"params", "step", "batch_stats"} and not caplog.records


@pytest.fixture
def unfinished_reads():
    """Orbax leaves coroutines unawaited where a read fails; Python says so when they are collected, here."""
    yield
    gc.collect()


def reads_damage(test):
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
    return pytest.mark.usefixtures("unfinished_reads")(ignored(test))


def restored_newest(folder):
    manager = checkpoint.manager(folder)
    try:
        return checkpoint.restore_newest(manager, state_at(0)), manager.all_steps()
    finally:
        manager.close()


@reads_damage
@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
def test_whatever_file_is_damaged_the_state_is_one_that_was_saved(two, tmp_path, caplog, kind):
    files = [path.relative_to(two) for path in (two / "checkpoints" / "2").rglob("*") if path.is_file()]
    noticed = set()
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        damage(folder / name, kind)
        caplog.clear()
        state, steps = restored_newest(folder)
        jax.tree.map(np.testing.assert_array_equal, state, state_at(int(state.step)))
        if int(state.step) == 1:
            noticed.add(name.name)
            assert f"{folder / 'checkpoints' / '2'} is damaged, moved to {folder / 'damaged' / '2'}" in caplog.text
            assert steps == [1] and (folder / "damaged" / "2" / name.relative_to("checkpoints/2")).exists()
        else:
            assert steps == [1, 2] and not (folder / "damaged").exists()
    assert {"manifest.ocdbt", "metadata"} <= noticed


@reads_damage
def test_no_flipped_bit_of_the_arrays_goes_unnoticed(tmp_path):
    """Orbax' own checks let some pass; where what was read is what was saved, the bit means nothing."""
    kernel = jax.random.normal(jax.random.key(0), (100, 100))
    saved = state_at(2)
    saved = saved.replace(batch_stats=distributed.replicate({"kernel": kernel}))
    manager = checkpoint.manager(tmp_path)
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
    whole = checkpoint.fingerprints({"a": arrays})["a"]
    words = [x.view(np.uint8 if x.dtype == bool else np.uint32).ravel().astype(object) for x in arrays]
    assert whole == sum((2 * i + 1) * int(word) for x in words for i, word in enumerate(x)) % 2**32
    assert checkpoint.fingerprints({"a": {"x": arrays[2], "y": tuple(arrays[:2])}}) == {"a": whole}
    for i in range(40):
        changed = [x.copy() for x in arrays[:2]]
        words = changed[i % 2].view(np.uint32).reshape(-1)
        words[rng.integers(words.size)] ^= np.uint32(1 << rng.integers(32))
        assert checkpoint.fingerprints({"a": [*changed, arrays[2]]})["a"] != whole


@reads_damage
def test_where_all_are_damaged_nothing_is_touched(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in "12":
        damage(tmp_path / "checkpoints" / step / "run" / "metadata", "truncated")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"(?s)none of the checkpoints in .* can be restored; nothing has been changed.*2: .*1: "
    ):
        restored_newest(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"the checkpoint .*/checkpoints/2 cannot be read"):
        checkpoint.restore_parts(tmp_path, 2, ("params",))


@reads_damage
def test_a_folder_without_a_checkpoint_in_it_is_set_aside(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "7").mkdir()
    state, steps = restored_newest(tmp_path)
    assert int(state.step) == 2 and steps == [1, 2]


def test_the_metrics_since_the_last_report_travel_with_the_state(tmp_path):
    values = np.random.default_rng(0).standard_normal(3, np.float32)
    recent = [{"loss": jnp.asarray(value), "failed_step": jnp.int32(-1)} for value in values] + [
        {"loss": np.float32("nan"), "failed_step": np.int32(5)}
    ]
    manager = checkpoint.manager(tmp_path, "eval/hit")
    checkpoint.save(manager, state_at(3), recent=recent)
    manager.wait_until_finished()
    back = checkpoint.recent_metrics(tmp_path, 3)
    np.testing.assert_array_equal([m["loss"] for m in back], [*values, np.nan])
    assert [m["failed_step"] for m in back] == [-1, -1, -1, 5]
    assert back[0]["loss"].dtype == np.float32 and back[0]["failed_step"].dtype == np.int32
    # The same step once it is evaluated: kept as the best, and with nothing left to report.
    checkpoint.save(manager, state_at(3), {"eval/hit": 0.9})
    for step in (4, 5, 6):
        checkpoint.save(manager, state_at(step), {"eval/hit": 0.1})
    manager.wait_until_finished()
    manager.close()
    assert checkpoint.available(tmp_path) == [3, 5, 6] and checkpoint.recent_metrics(tmp_path, 3) == []


def test_the_error_of_a_run_is_not_replaced_by_that_of_a_save_that_fails_as_it_ends(tmp_path, monkeypatch, caplog):
    def fails():
        raise ValueError("RESOURCE_EXHAUSTED")

    with pytest.raises(KeyError, match="of the run"), checkpoint.opened(tmp_path) as checkpoints:
        close = checkpoints.close
        monkeypatch.setattr(checkpoints, "close", fails)
        raise KeyError("of the run")
    close()
    assert "could not be written to" in caplog.text and "RESOURCE_EXHAUSTED" in caplog.text


def test_json_is_written_whole(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"x": 1})
    checkpoint.write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]} and len(list(tmp_path.iterdir())) == 1
