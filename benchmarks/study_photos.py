"""Do soft labels help on photographs with noisy sentences? Trains every objective on frozen towers' features.

    python benchmarks/study_photos.py --data=FOLDER --image-weights=FOLDER      # everything; again: continues it
    python benchmarks/photos_report.py                                          # tables and the figure

The data are photographs with one sentence each, in shards: `train-*.tar` (KEY.jpg, KEY.txt, KEY.json with the class
name as `true`), `test-*.tar` (KEY.jpg, KEY.cls), `names.txt`, `unseen.txt` (the names that no training photograph has,
with commas) and `sentences.json` (the sentences of each name). A wrong sentence is a random one of another class.

Each run is `zslflax.training.loop.train` on configs/photos.py with the changes made here, and adds a line to the
results. The seed of a run is that of its parameters, its order, its choice of photographs and its wrong sentences; all
methods have the same. The parts:

    search       the passes over the data, and at noise 0.4 and 24,000 pairs the method's own parameter, judged on 4,000
                 training photographs that are held out and keep their true class
    grid         each method with what was found × noise and pairs (`LEVELS`) × seeds, judged on the test photographs
    clean        InfoNCE on clean sets of several sizes
    rates        other learning rates than the one that all methods share, judged as in the search
    generations  the finished model of a run of the grid teaches a new one by self-distillation
    kept         training on the pairs that the noise tool keeps, by the scores of a run of the grid

The image features are computed by the first run (minutes) and kept in `features.folder`.
"""

import argparse
import logging
import runpy
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from json_lines import append_line, read_lines
from photos_data import Pairs, Photos, auc, kept_pairs
from photos_plan import ALL, FEW, FILTERED, METHODS, REPEATED, TEACHERS, Run, plan_runs

from zslflax import distributed
from zslflax.cli import start_logging
from zslflax.config import eval_set
from zslflax.config_checks import validate
from zslflax.evaluation.caption_noise import EmbeddedPairs, pair_scores
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.models.build import resolve_model
from zslflax.training import loop
from zslflax.training.frozen_features import open_features
from zslflax.training.initial_state import create_state

log = logging.getLogger("zslflax")
CONFIG = Path(__file__).parents[1] / "configs" / "photos.py"
RESULTS = Path(__file__).parent / "results" / "photos.jsonl"
TEMPERATURE = 0.01  # of the belief that is measured
BELIEFS = 4_096  # training pairs whose soft labels are measured, 512 at a time


def make_config(run: Run, pairs: int, arguments: argparse.Namespace, photos: Photos):
    """The config of photographs with the settings of a run."""
    method = METHODS[run.method]
    c = runpy.run_path(str(CONFIG))["get_config"](method.objective)
    c.name, c.seed = run.name, run.seed
    c.objective.update(method.fixed | {method.parameter: run.value})
    c.steps = round(run.passes * pairs / c.batch_size)
    c.objective.soft_ramp_steps = c.steps // 5
    c.optimizer.learning_rate = run.rate
    c.eval.every = c.checkpoint.every = -(-c.steps // 4) if run.probed else c.steps
    c.model.image.pretrained = str(arguments.image_weights)
    c.features.folder = str(arguments.features)
    c.data.train, c.data.threads = ("photographs",), 1
    c.eval.sets = {"test": eval_set()} if run.held_out else {"test": photos.test_set}
    if run.teacher != "ema":
        c.teacher.kind, c.teacher.workdir = "checkpoint", str(arguments.folder / run.teacher)
        c.objective.soft_ramp_steps = 0  # this teacher is trained from the start
    validate(c)
    return c


class Measure:
    """Measures what `zslflax.main` does not, on cached features; `loop.train` calls it at each evaluation."""

    def __init__(self, run: Run, config, photos: Photos, pairs: Pairs, features: dict, folder: Path):
        self.run, self.config, self.photos, self.pairs, self.features = run, config, photos, pairs, features
        self.folder = folder

    def __call__(self, predictors: dict[str, Predictor]) -> dict[str, float]:
        photos, results = self.photos, {}
        for model, predictor in predictors.items():
            prefix = f"{model}/" if model else ""
            class_emb = predictor.class_embeddings(photos.names, self.config.eval.templates)
            if self.run.held_out:
                held_out = np.flatnonzero(photos.held_out)
                image_emb = predictor.project_image(self.features["train"][held_out])
                results |= hits(image_emb @ class_emb.T, photos.labels[held_out], prefix)
            else:  # the names without captions, alone
                alone = np.flatnonzero(np.isin(photos.test_labels, photos.unseen))
                image_emb = predictor.project_image(self.features["test"][alone])
                labels = np.searchsorted(photos.unseen, photos.test_labels[alone])
                results |= hits(image_emb @ class_emb[photos.unseen].T, labels, f"{prefix}alone/")
        return results | (self.beliefs(predictors[""]) if self.run.scored else {})

    def beliefs(self, predictor: Predictor) -> dict[str, float]:
        """How well the model's belief in the training pairs, and the noise tool's scores, find the wrong ones."""
        last = predictor.step == self.config.steps
        order = np.random.default_rng(self.run.seed).permutation(len(self.pairs.index))
        order = order[: len(order) if last else BELIEFS]
        captions, wrong = [self.pairs.captions[i] for i in order], self.pairs.wrong[order]
        image_emb = predictor.project_image(self.features["train"][self.pairs.index[order]])
        embedded = EmbeddedPairs(order, image_emb, predictor.encode_text(captions), captions)
        scores = pair_scores(embedded)
        results = {"auc/similarity": auc(scores, wrong)}
        belief = []
        for start in range(0, BELIEFS, 512):
            rows = slice(start, start + 512)
            p = jax.nn.softmax(image_emb[rows] @ embedded.text_emb[rows].T / TEMPERATURE, axis=1)
            belief.append(np.diagonal(p))
        results["auc/belief"] = auc(np.concatenate(belief), wrong[:BELIEFS])
        if last:
            for share in FILTERED:
                found = wrong[np.argsort(scores, kind="stable")[: round(share * len(scores))]]
                results |= {
                    f"noise/{share}/precision": found.mean(),
                    f"noise/{share}/recall": found.sum() / wrong.sum(),
                }
            (self.folder / "scores").mkdir(exist_ok=True)
            np.save(self.folder / "scores" / f"{self.run.name}.npy", scores[np.argsort(order)])
        return results


def hits(similarities: np.ndarray, labels: np.ndarray, prefix: str) -> dict[str, float]:
    """hit@1 and hit@5 of similarities [n, classes]."""
    rank = np.sum(similarities > similarities[np.arange(len(labels)), labels][:, None], axis=1)
    return {f"{prefix}hit@{k}": float(np.mean(rank < k)) for k in (1, 5)}


def read_features(config, photos: Photos) -> dict[str, np.ndarray]:
    """The frozen image tower's features of the training and test photographs, computed where they are missing."""
    config = config.copy_and_resolve_references()
    config.model = resolve_model(config.model)
    model, tokenizer = build_model(config)
    state, _ = create_state(config, model, pretrained=True)
    features = open_features(config, model, tokenizer, state, [photos.source], [photos.test])
    test_features = features.open_test_images(photos.test)
    return {"train": all_rows(features.train_images[0]), "test": all_rows(test_features)}


def all_rows(features) -> np.ndarray:
    return features(np.arange(len(features)))[0]


def perform_run(run: Run, arguments: argparse.Namespace, photos: Photos, features: dict) -> dict:
    """Trains and evaluates; returns the line of the results."""
    started, cpu = time.time(), time.process_time()
    pairs = photos.pairs(run.size, run.noise, run.seed, held_out=run.held_out)
    if run.kept:
        scored, share = run.kept.split()
        pairs = kept_pairs(pairs, np.load(arguments.folder / "scores" / f"{scored}.npy"), float(share))
    config, workdir = make_config(run, len(pairs.index), arguments, photos), arguments.folder / run.name
    measure = Measure(run, config, photos, pairs, features, arguments.folder)
    shutil.rmtree(workdir, ignore_errors=True)
    if not loop.train(config, workdir, sources=[pairs.source], extra_metrics=measure):
        raise SystemExit(0)
    history = read_lines(workdir / "metrics.jsonl")
    keep = ("eval/", "alone/", "student/", "hit@", "auc/", "noise/")
    evaluated = [
        {key: round(value, 5) for key, value in line.items() if key.startswith(keep) or key in ("step", "train/loss")}
        for line in history
        if any(key.startswith(("eval/", "hit@", "alone/")) for key in line)
    ]
    line = run._asdict() | {"name": run.name, "pairs": len(pairs.index), "wrong": round(float(pairs.wrong.mean()), 4)}
    line |= evaluated[-1] | {"history": evaluated if run.probed else []}
    line |= {"seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    if not (
        run.part == "grid" and (run.noise, run.size) == (0.4, ALL) and run.method in TEACHERS and run.seed < REPEATED
    ):
        shutil.rmtree(workdir)
    return line | {"jax": jax.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the photographs and sentences")
    parser.add_argument("--image-weights", type=Path, required=True, help="folder of EfficientNet-Lite0's safetensors")
    parser.add_argument("--folder", type=Path, default=Path("runs/study_photos"), help="of the runs")
    parser.add_argument("--features", type=Path, default=Path("~/.cache/zslflax/features"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run begins")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.absolute()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    start_logging()
    until, photos = time.time() + 60 * arguments.minutes, Photos(arguments.data)
    config = make_config(Run("search", "info_nce", 0.0, FEW, 0, 1.0, 3.9), FEW, arguments, photos)
    distributed.initialize(config.compilation_cache)
    features, performed = read_features(config, photos), 0
    while time.time() < until:
        lines = read_lines(arguments.results)
        done = {line["name"] for line in lines}
        run = next((run for run in plan_runs(lines) if run.name not in done), None)
        if run is None:
            return
        line = perform_run(run, arguments, photos, features)
        append_line(arguments.results, line)
        shown = line.get("hit@1", line.get("eval/test/hit@1"))
        print(f"{len(lines) + 1} {run.name}: {shown}, {line['seconds']} s, {line['cpu_seconds']} s of CPU", flush=True)
        performed += 1
        if performed % 20 == 0:
            jax.clear_caches()  # each run compiles its own step, whose memory maps would add up


if __name__ == "__main__":
    main()
