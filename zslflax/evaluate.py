"""Zero-shot evaluation of a model on the config's test sets, by all devices of all processes."""

import logging
from pathlib import Path

import jax
import numpy as np

from zslflax import parallel, pictures
from zslflax.data import pairs, scenes
from zslflax.predict import Predictor
from zslflax.zeroshot.classifier import top_k
from zslflax.zeroshot.labels import LabelSpace, read_names
from zslflax.zeroshot.metrics import harmonic_mean, hit_at_k, mean_average_precision
from zslflax.zeroshot.retrieval import retrieval_recall

log = logging.getLogger("zslflax")
HITS, RECALLS = (1, 2, 5, 10), (1, 5, 10)


def evaluate(predictors: dict[str, Predictor], config, workdir: Path, step: int) -> dict[str, float]:
    """Metrics of every test set, `eval/SET/METRIC`, and the picture of the first predictor's answers.

    Args:
        predictors: by the suffix of the set's name in the metrics' names: {"": teacher, "_student": student}.
        config: the whole config.
        workdir: predictions/STEP.png is written there.
        step: names the picture.
    """
    metrics = {}
    for name, test in config.eval.sets.items():
        if not test.data:
            continue
        source = pairs.open_source(test.data, config.data, "test")
        labels = label_space(test)
        for suffix, predictor in predictors.items():
            embedded = embed(predictor, source, config)
            results, best = score(predictor, embedded, labels, config)
            metrics |= {f"eval/{name}{suffix}/{metric}": value for metric, value in results.items()}
            if suffix == "" and best is not None and parallel.is_main():
                picture = draw(source, embedded, labels, best, config)
                path = workdir / "predictions" / (f"{step}.png" if len(config.eval.sets) == 1 else f"{step}-{name}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    return metrics
