"""Do soft labels help where pairs are noisy? Trains every objective on pairs of known noise.

    python benchmarks/study.py --folder=runs/study                       # everything; start it again and it goes on
    python benchmarks/study.py --folder=runs/study --parts short         # minutes: an average teaches, then a run
    python benchmarks/study_report.py runs/study/results.jsonl           # tables and figures

The pairs are the built-in scenes, of which a share `noise` has the caption of another picture; which ones is
known. Each run is `zslflax.train.train` on the quick start's config with what is written here, and adds a line to
results.jsonl. Several processes may share a folder, and a core each is the best use of a CPU.

    search        every method's own parameter, three values each (and one more beyond where the last was the best),
                  judged on a validation split: pictures of another seed, which no other part sees
    grid          every method with the values found × size and noise (`LEVELS`) × seeds, judged on the test split
    generations   a frozen teacher from a finished run teaches a fresh student, which teaches the next
    long          2.4 times as many pairs (`LONG`), and a larger test split: hard labels have the time to overfit
    early         generations whose first teacher stops after a quarter of the steps, at 2,000 pairs: before it has
                  learnt the wrong captions by heart
    cold          self-distillation with sharper soft labels, and with and without a ramp, from the first step

All other runs have the same steps, batch size and schedule. A seed is that of parameters, order and augmentation; the
pictures are the same for all.
"""

import argparse
import fcntl
import json
import logging
import runpy
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from zslflax import config, distributed
from zslflax.config import eval_set
from zslflax.data import preprocess
from zslflax.data.sources import shapes
from zslflax.data.sources.opening import open_source
from zslflax.inference.restore import build_model
from zslflax.training import input, loop, metrics
from zslflax.training.setup import create_state

log = logging.getLogger("zslflax")
DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
VALIDATION_SEED = 1_000  # of the pictures that hyper-parameters are chosen on
SEARCH_SEED = 100
RATES = (4e-3,)  # peak learning rates that the search tries
# Training pairs and noise of the grid, the most telling first: a study that was broken off says something.
LEVELS = ((20_000, 0.4), (2_000, 0.4), (2_000, 0.0), (2_000, 0.6), (20_000, 0.0), (2_000, 0.2))
SIZES = (20_000, 2_000)  # of which generations and long runs are looked at
SEEDS = (0, 1, 2)
GENERATIONS = 3
LONG = {"steps": 1_200, "batch_size": 256, "test": 8_000}  # test pictures
COMPARED = ("info_nce", "self_distillation_within")  # in long runs
PROBED = 512  # training pairs whose soft labels are looked at
EVALUATIONS = 6  # of a run that is looked at while it trains


class Method(NamedTuple):
    """An objective, what is fixed of it, and its own parameter with the values that the search tries."""

    objective: str
    fixed: dict
    parameter: str
    values: tuple[float, ...]


BOTH = {"image_image_weight": 0.3, "text_text_weight": 0.3}
METHODS = {
    "info_nce": Method("info_nce", {}, "log_scale", (2.6, 3.9, 1.6)),
    "label_smoothing": Method("label_smoothing", {}, "smoothing", (0.1, 0.3, 0.5)),
    "self_distillation": Method("self_distillation", {}, "teacher_temperature", (0.05, 0.1, 0.2)),
    "self_distillation_within": Method("self_distillation", BOTH, "teacher_temperature", (0.05, 0.1, 0.2)),
    "otter": Method("otter", {}, "sinkhorn_regulariser", (0.08, 0.15, 0.3, 0.6)),
    "sigmoid": Method("sigmoid", {"log_scale": 2.6}, "bias", (-10.0, -5.0, -2.5)),  # from the same scale as the others
}


class Run(NamedTuple):
    """What is different between runs."""

    part: str
    method: str
    noise: float = 0.4
    size: int = 20_000  # training pairs
    seed: int = 0
    rate: float = RATES[0]
    value: float | None = None  # of the method's own parameter
    generation: int = 1
    ramp: int | None = None  # steps; None: the quick start's
    probed: bool = False

    @property
    def name(self) -> str:
        """Distinct for distinct runs, fit for a folder."""
        return "-".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in self)


def config_of(run: Run, folder: Path, steps: int, image_size: int):
    """The quick start's config with what this run is about."""
    method = METHODS[run.method]
    c = runpy.run_path(str(DEMO))["get_config"](method.objective)
    if run.part == "long":
        steps, c.batch_size, c.data.shapes.test = LONG["steps"], LONG["batch_size"], LONG["test"]
    if run.part == "early" and run.generation == 1:
        steps //= 4
    c.name, c.seed, c.steps = run.name, run.seed, steps
    c.model.image.size = c.data.shapes.size = image_size
    c.objective.update(method.fixed | ({} if run.value is None else {method.parameter: run.value}))
    c.objective.soft_ramp_steps = steps // 5 if run.ramp is None else run.ramp
    c.optimizer.learning_rate, c.optimizer.warmup_steps = run.rate, steps // 20
    c.data.threads = 2
    c.data.shapes.update(root=str(folder / "shapes"), train=run.size, noise=run.noise)
    c.eval.every = steps // EVALUATIONS if run.probed else steps
    c.checkpoint.every = 10 * steps
    if run.part == "search":
        del c.eval.sets["test"]
        c.eval.sets["validation"] = validation_set(folder, c.data.shapes)
    if run.generation > 1:
        c.teacher.kind, c.teacher.workdir = "checkpoint", str(folder / teacher_of(run).name)
        c.objective.soft_ramp_steps = 0  # this teacher knows something from the start
    config.validate(c)
    return c


def teacher_of(run: Run) -> Run:
    """The run whose model teaches a later generation."""
    if run.part == "generations" and run.generation == 2:
        return run._replace(part="grid", generation=1, probed=True)
    return run._replace(generation=run.generation - 1)


def validation_set(folder: Path, options):
    """Pictures of another seed."""
    written = shapes.ensure_shards(
        folder / "shapes", train=1, test=options.test, size=options.size, seed=VALIDATION_SEED
    )
    unseen = ",".join(shapes.CLASS_NAMES[i] for i in shapes.UNSEEN)
    return eval_set(data=written.test, names=",".join(shapes.CLASS_NAMES), unseen=unseen)


def search() -> Iterator[Run]:
    for name, method in METHODS.items():
        for rate in RATES:
            for value in method.values:
                yield Run("search", name, seed=SEARCH_SEED, rate=rate, value=value)


def grid(found: dict[str, dict]) -> Iterator[Run]:
    for size, noise in LEVELS:
        for seed in SEEDS:
            for name in METHODS:
                yield Run("grid", name, noise, size, seed, **found[name], probed=is_probed(name, noise, size))


def is_probed(name: str, noise: float, size: int) -> bool:
    """Whether a run of the grid is evaluated on its way; those are also the ones that teach a next generation."""
    probed = {20_000: ("info_nce", "self_distillation", "self_distillation_within"), 2_000: ("self_distillation",)}
    return noise == 0.4 and name in probed[size]


def generations(found: dict[str, dict]) -> Iterator[Run]:
    best = found["self_distillation"]
    for size in SIZES:
        for generation in range(2, GENERATIONS + 1):
            for seed in SEEDS:
                yield Run("generations", "self_distillation", size=size, seed=seed, **best, generation=generation)


def long(found: dict[str, dict]) -> Iterator[Run]:
    for size in SIZES:
        for seed in SEEDS:
            for name in COMPARED:
                yield Run("long", name, size=size, seed=seed, **found[name])


def early(found: dict[str, dict]) -> Iterator[Run]:
    best = found["self_distillation"]
    for generation in (1, 2):
        for seed in SEEDS:
            yield Run("early", "self_distillation", 0.4, 2_000, seed, **best, generation=generation, probed=True)


def cold(found: dict[str, dict]) -> Iterator[Run]:
    rate = found["self_distillation"]["rate"]
    for temperature in (0.01, 0.1):
        for ramp in (0, None):
            yield Run("cold", "self_distillation", rate=rate, value=temperature, ramp=ramp, probed=True)


def short() -> Iterator[Run]:
    for generation in (1, 2):
        yield Run("short", "self_distillation", value=0.1, generation=generation, probed=True)


def best_of_search(lines: list[dict]) -> dict[str, dict]:
    """Of each method the learning rate and parameter with the most hits on the validation split."""
    found = {}
    for name in METHODS:
        tried = [line for line in lines if line["part"] == "search" and line["method"] == name]
        if len(tried) == len(RATES) * len(METHODS[name].values):
            best = max(tried, key=lambda line: line["eval/validation/hit@1"])
            found[name] = {"rate": best["rate"], "value": best["value"]}
    return found


class Probe:
    """What soft labels say of training pairs, of which it is known whether the caption is the picture's own.

    A row's candidates are the given captions of all the probed pairs and, where that is another one, the picture's own;
    their probabilities are softmax(v·t / τ) with the image-text similarities of the shipped model.
    """

    def __init__(self, config):
        c = config.data.shapes
        source = open_source("shapes", config.data, "train")
        others = shapes.mismatched_captions(c.train, c.noise, c.seed)
        records = [source[i] for i in range(PROBED)]
        self.images = [preprocess.record_image(record) for record in records]
        self.given = [record["text"][0] for record in records]
        self.true = [shapes.describe_image(c.seed, "train", i).caption for i in range(PROBED)]
        self.mismatched = np.array([i in others and self.given[i] != self.true[i] for i in range(PROBED)])
        self.temperature = config.objective.teacher_temperature

    def __call__(self, predictors) -> dict[str, float]:
        predictor = predictors[""]
        v, given, true = predictor.encode_image(self.images), *map(predictor.encode_text, (self.given, self.true))
        similarity = np.concatenate([v @ given.T, np.sum(v * true, axis=1, keepdims=True)], axis=1)
        similarity[~self.mismatched, -1] = -np.inf  # it is among the given ones
        p = jax.nn.softmax(similarity / self.temperature, axis=1)
        p = np.asarray(p, np.float64)
        entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=1)
        on_given, marginal = p[np.arange(PROBED), np.arange(PROBED)], p[:, :-1].mean(axis=0)
        marginal /= marginal.sum()
        clean, wrong = ~self.mismatched, self.mismatched
        return {
            "probe/clean/entropy": entropy[clean].mean(),
            "probe/clean/given": on_given[clean].mean(),
            "probe/mismatched/entropy": entropy[wrong].mean(),
            "probe/mismatched/given": on_given[wrong].mean(),
            "probe/mismatched/true": p[wrong, -1].mean(),
            "probe/mismatched/true_is_likelier": (p[wrong, -1] > on_given[wrong]).mean(),
            # Captions that share the soft labels, e to the entropy of the mean row; 1: all pictures are taught one.
            "probe/captions_in_use": np.exp(-np.sum(marginal * np.log(np.maximum(marginal, 1e-30)))),
        }


def perform(run: Run, folder: Path, steps: int, image_size: int, text_features):
    """Trains and evaluates; returns the result's line and the text features, for the next run.

    Raises:
        SystemExit: the run was asked to stop; it has saved its state, and goes on when it is performed again.
    """
    started, config, workdir = time.time(), config_of(run, folder, steps, image_size), folder / run.name
    distributed.start(config.compilation_cache)
    if text_features is None:
        model, _ = build_model(config)
        state, _, frozen = create_state(config, model, pretrained_weights=True)
        text_features = input.kept_text_features(config, model, state, frozen)
    measure = Probe(config) if run.probed else None
    if not loop.train(config, workdir, text_features=text_features, measure=measure):
        raise SystemExit(0)
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [
        {key: value for key, value in line.items() if key.startswith(("eval/", "probe/")) or key == "step"}
        for line in history
        if any(key.startswith("eval/") for key in line)
    ]
    line = run._asdict() | {"name": run.name, "steps": config.steps, "image_size": image_size} | evaluated[-1]
    line |= {"train/loss": history[-1]["train/loss"], "seconds": round(time.time() - started)}
    line |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "history": evaluated if run.probed else []}
    if not (run.probed or run.generation > 1):
        shutil.rmtree(workdir)
    jax.clear_caches()  # each run compiles its own functions; what they map would add up
    return line, text_features


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def claimed(path: Path):
    """An open file that holds the claim of a run, or None where another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def append(path: Path, line: dict) -> None:
    with open(path, "a") as file:  # short enough to be written in one go, whoever else appends
        file.write(json.dumps(line) + "\n")


def plan(parts: list[str], lines: list[dict]) -> list[Run]:
    """All runs of these parts, as far as what they need to know has been found."""
    at_once = {"search": search, "short": short}
    searched = {"grid": grid, "generations": generations, "long": long, "early": early, "cold": cold}
    runs, found = [], best_of_search(lines)
    for part in parts:
        if part in at_once:
            runs += at_once[part]()
        elif len(found) == len(METHODS):
            runs += searched[part](found)
    return runs


def take(runs: list[Run], done: set[str], folder: Path):
    """The first run that can begin and that no other process is at: itself and its claim, or None."""
    for run in runs:
        if run.name not in done and (run.generation == 1 or teacher_of(run).name in done):
            if claim := claimed(folder / "claims" / run.name):
                return run, claim
    return None


def work(folder: Path, parts: list[str], steps: int, image_size: int, until: float) -> None:
    """Performs one run after the other."""
    results, text_features = folder / "results.jsonl", None
    while time.time() < until:
        lines = read_lines(results)
        runs, done = plan(parts, lines), {line["name"] for line in lines}
        if runs and all(run.name in done for run in runs) and len(parts) == len({run.part for run in runs}):
            return
        taken = take(runs, done, folder)
        if taken is None:
            time.sleep(5)  # others are at what is left, or at what decides the rest
            continue
        run, claim = taken
        with claim:
            if run.name not in {line["name"] for line in read_lines(results)}:  # nor has been finished meanwhile
                log.info("%d of %d runs are done; now %s", len(done), len(runs), run.name)
                line, text_features = perform(run, folder, steps, image_size, text_features)
                append(results, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parts = ["search", "grid", "generations", "long", "early", "cold", "short"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument("--steps", type=int, default=1_000, help="of each run")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins later than that")
    arguments = parser.parse_args()
    metrics.start_logging()
    until = time.time() + 60 * arguments.minutes
    work(arguments.folder.absolute(), arguments.parts, arguments.steps, arguments.image_size, until)


if __name__ == "__main__":
    main()
