"""Do soft labels help if pairs are noisy? Trains every objective on pairs with a known share of wrong captions.

    python benchmarks/study.py --folder=runs/study                       # everything; the same command continues it
    python benchmarks/study.py --folder=runs/study --parts short         # minutes: an EMA teacher, then a fixed one
    python benchmarks/study_report.py runs/study/results.jsonl           # tables and figures

The pairs are the built-in shapes, of which a share `noise` has the caption of another image; it is known which ones.
Each run is `zslflax.training.loop.train` on the quick start's config with the changes made here, and adds a line to
results.jsonl. Several processes may share a folder; on a CPU one process per core is fastest.

    search        each method's own parameter, with three values (and one more beyond the last if that was the best),
                  judged on a validation split: images of another seed, which no other part sees
    grid          each method with the values found × size and noise (`study_plan.LEVELS`) × seeds, on the test split
    generations   a fixed teacher from a finished run teaches a new student, which teaches the next one
    long          2.4 times as many pairs (`LONG`) and a larger test split: hard labels have time to overfit
    early         generations at 2,000 pairs whose first teacher stops after a quarter of the steps, before it has
                  memorised the wrong captions
    cold          self-distillation with sharper soft labels, with and without a ramp, from the first step

All other runs have the same steps, batch size and schedule. A seed is that of parameters, order and augmentation; all
runs have the same images.
"""

import argparse
import fcntl
import logging
import runpy
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from json_lines import append_line, read_lines
from study_plan import METHODS, Run, plan_runs, teacher_of

from zslflax import distributed
from zslflax.cli import start_logging
from zslflax.config import eval_set
from zslflax.config_checks import validate
from zslflax.data import preprocess
from zslflax.data.sources import shapes
from zslflax.data.sources.opening import open_source
from zslflax.inference.restore import build_model
from zslflax.training import loop
from zslflax.training.frozen_features import open_text_features
from zslflax.training.initial_state import create_state

log = logging.getLogger("zslflax")
DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
VALIDATION_SEED = 1_000  # of the images on which hyper-parameters are chosen
LONG = {"steps": 1_200, "batch_size": 256, "test": 8_000}  # test images
PROBED = 512  # training pairs whose soft labels are measured
EVALUATIONS = 6  # of a run that is measured while it trains


def make_config(run: Run, folder: Path, steps: int, image_size: int):
    """The quick start's config with the settings of a run."""
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
    c.features.folder = str(folder / "features")
    c.data.threads = 2
    c.data.shapes.update(root=str(folder / "shapes"), train=run.size, noise=run.noise)
    c.eval.every = steps // EVALUATIONS if run.probed else steps
    c.checkpoint.every = 10 * steps
    if run.part == "search":
        del c.eval.sets["test"]
        c.eval.sets["validation"] = validation_set(folder, c.data.shapes)
    if run.generation > 1:
        c.teacher.kind, c.teacher.workdir = "checkpoint", str(folder / teacher_of(run).name)
        c.objective.soft_ramp_steps = 0  # this teacher is trained from the start
    validate(c)
    return c


def validation_set(folder: Path, options):
    """Images of another seed."""
    written = shapes.ensure_shards(
        folder / "shapes", train=1, test=options.test, size=options.size, seed=VALIDATION_SEED
    )
    unseen = ",".join(shapes.CLASS_NAMES[i] for i in shapes.UNSEEN)
    return eval_set(data=written.test, class_names=",".join(shapes.CLASS_NAMES), unseen=unseen)


class Probe:
    """Measures the soft labels of training pairs of which it is known whether the caption is the image's own.

    The candidates of an image are the given captions of all probed pairs and, if its given caption is wrong, its own
    caption. Their probabilities are softmax(v·t / τ) with the image-text similarities of the shipped model.
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
        similarity[~self.mismatched, -1] = -np.inf  # it is among the given captions
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
            # Effective number of captions in the soft labels, e to the entropy of the mean row; 1: the same for all.
            "probe/captions_in_use": np.exp(-np.sum(marginal * np.log(np.maximum(marginal, 1e-30)))),
        }


def perform_run(run: Run, folder: Path, steps: int, image_size: int, text_features):
    """Trains and evaluates; returns the line of results.jsonl, and the text features for the next run.

    Raises:
        SystemExit: the run was asked to stop. It has saved its state and continues when it is performed again.
    """
    started, config, workdir = time.time(), make_config(run, folder, steps, image_size), folder / run.name
    distributed.initialize(config.compilation_cache)
    if text_features is None:
        model, tokenizer = build_model(config)
        state, _ = create_state(config, model, pretrained=True)
        text_features = open_text_features(config, model, tokenizer, state.frozen_params["text"]["tower"])
    probe = Probe(config) if run.probed else None
    if not loop.train(config, workdir, text_features=text_features, extra_metrics=probe):
        raise SystemExit(0)
    history = read_lines(workdir / "metrics.jsonl")
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
    jax.clear_caches()  # each run compiles its own functions, whose memory maps would add up
    return line, text_features


def claim_run(path: Path):
    """Returns an open file that holds the claim of a run, or None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def take_run(runs: list[Run], done: set[str], folder: Path):
    """The first run that can begin and that no other process performs, with its claim; or None."""
    for run in runs:
        if run.name not in done and (run.generation == 1 or teacher_of(run).name in done):
            if claim := claim_run(folder / "claims" / run.name):
                return run, claim
    return None


def perform_runs(folder: Path, parts: list[str], steps: int, image_size: int, until: float) -> None:
    """Performs one run after another."""
    results, text_features = folder / "results.jsonl", None
    while time.time() < until:
        lines = read_lines(results)
        runs, done = plan_runs(parts, lines), {line["name"] for line in lines}
        if runs and all(run.name in done for run in runs) and len(parts) == len({run.part for run in runs}):
            return
        taken = take_run(runs, done, folder)
        if taken is None:
            time.sleep(5)  # other processes perform the remaining runs, or runs that these depend on
            continue
        run, claim = taken
        with claim:
            if run.name not in {line["name"] for line in read_lines(results)}:  # it has not been finished meanwhile
                log.info("%d of %d runs are complete; starting %s", len(done), len(runs), run.name)
                line, text_features = perform_run(run, folder, steps, image_size, text_features)
                append_line(results, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parts = ["search", "grid", "generations", "long", "early", "cold", "short"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument("--steps", type=int, default=1_000, help="of each run")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run begins")
    arguments = parser.parse_args()
    start_logging()
    until = time.time() + 60 * arguments.minutes
    perform_runs(arguments.folder.absolute(), arguments.parts, arguments.steps, arguments.image_size, until)


if __name__ == "__main__":
    main()
