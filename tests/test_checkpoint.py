"""Checkpoints: which are kept, and that they do not know how many devices wrote them."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zslflax import checkpoint, parallel
from zslflax import state as states


def state_at(step):
    leaf = lambda seed: {"kernel": jax.random.normal(jax.random.key(seed), (4, 3))}
    params = {m: {"tower": leaf(i), "projection": leaf(i + 2)} for i, m in enumerate(("image", "text"))}
    params["objective"] = {"hard_log_scale": jnp.float32(step)}
    state = states.create({"params": params, "batch_stats": {}}, optax.adam(0.1), ema=True, frozen=())
    return parallel.replicate(state.replace(step=jnp.int32(step)))


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
from test_checkpoint import state_at
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
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": os.pathsep.join(paths)}
    arguments = [sys.executable, "-c", RESTORE, str(tmp_path), str(devices)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    manager = checkpoint.manager(tmp_path)
    restored = checkpoint.restore(manager, state_at(0))
    manager.close()
    assert int(restored.step) == 8 and restored.step.sharding.num_devices == 4
    jax.tree.map(np.testing.assert_array_equal, restored.params, state_at(7).params)


def test_json_is_written_whole(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"x": 1})
    checkpoint.write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]} and len(list(tmp_path.iterdir())) == 1
