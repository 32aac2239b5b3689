"""Evaluates a train state on the test sets: its teacher, which is what a run ships, and its student."""

import logging
from collections.abc import Callable
from pathlib import Path

from zslflax.data.image_features import ImageFeatures
from zslflax.data.sources.base import Source
from zslflax.errors import UserError, nearest_names
from zslflax.evaluation.results import flat_names, format_table
from zslflax.evaluation.test_sets import TestSet
from zslflax.evaluation.zero_shot import evaluate
from zslflax.inference.predictor import Predictor
from zslflax.training.train_state import TrainState, student_variables, teacher_variables

log = logging.getLogger("zslflax")


def evaluate_state(
    predictor: Predictor,
    test_sets: list[TestSet],
    workdir: Path,
    extra_metrics: Callable[[dict[str, Predictor]], dict[str, float]] | None,
    features_of: Callable[[Source], ImageFeatures] | None,
    state: TrainState,
) -> dict[str, float]:
    """Evaluates the EMA teacher and the student; without an EMA, the student alone.

    Args:
        predictor: has the run's config, model and tokenizer.
        test_sets: from `open_test_sets`.
        workdir: the folder for pictures of predictions.
        extra_metrics: maps {"": the shipped predictor, "student": the student, if there is an EMA} to more metrics.
        features_of: as `zero_shot.evaluate` takes it.
        state: the train state.

    Returns:
        Metrics by name: "eval/SET/METRIC" of the shipped predictor, "eval/SET/student/METRIC" of the student.

    Raises:
        UserError: the config's `eval.best_metric` is not among the metrics.
    """
    step = int(state.step)
    student = predictor.with_variables(student_variables(state), step)
    predictors = {"": student}
    if state.teacher_params:
        predictors = {"": predictor.with_variables(teacher_variables(state), step), "student": student}
    results = evaluate(predictors, test_sets, predictor.config, workdir, features_of=features_of)
    if results:
        log.info("step %d\n%s", step, format_table(results))
    metrics = flat_names(results)
    if extra_metrics:
        metrics |= extra_metrics(predictors)
    best_metric = predictor.config.eval.best_metric
    if best_metric and best_metric not in metrics:
        near = nearest_names(best_metric, metrics, 3) or "none, because nothing is evaluated"
        raise UserError(f"config: eval.best_metric is {best_metric!r}, which no evaluation gives; nearest: {near}")
    return metrics
