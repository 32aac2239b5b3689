"""Evaluates a train state on the test sets: its teacher, which is what a run ships, and its student."""

import logging
from pathlib import Path

from zslflax.errors import UserError, nearest_names
from zslflax.evaluation.results import flat_names, format_table
from zslflax.evaluation.zero_shot import evaluate
from zslflax.inference.predictor import Predictor
from zslflax.training.train_state import TrainState, student_variables, teacher_variables

log = logging.getLogger("zslflax")


def evaluate_state(
    predictor: Predictor, test_sets, workdir: Path, extra_metrics, state: TrainState
) -> dict[str, float]:
    """Evaluates the teacher and the student as they are; without an EMA there is only the student."""
    step = int(state.step)
    predictors = {"": predictor.with_variables(student_variables(state), step)}
    if state.teacher_params:
        teacher = predictor.with_variables(teacher_variables(state), step)
        predictors = {"": teacher, "student": predictors[""]}
    results = evaluate(predictors, test_sets, predictor.config, workdir)
    if results:
        log.info("step %d\n%s", step, format_table(results))
    metrics = flat_names(results)
    metrics |= extra_metrics(predictors) if extra_metrics else {}
    if (best := predictor.config.eval.best_metric) and best not in metrics:
        near = nearest_names(best, metrics, 3) or "none, because nothing is evaluated"
        raise UserError(f"config: eval.best_metric is {best!r}, which no evaluation gives; nearest: {near}")
    return metrics
