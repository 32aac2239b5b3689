"""Evaluates a train state, or a checkpoint of a run: its teacher, which is what a run ships, and its student."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.config import default_config, eval_set, keeps_average
from zslflax.config_checks import check_devices, check_eval, check_paths
from zslflax.config_names import check_field, get_field
from zslflax.data.addresses import hide_credentials
from zslflax.data.image_features import ImageFeatures
from zslflax.data.sources.base import Source
from zslflax.errors import StorageError, UserError, nearest_names
from zslflax.evaluation.results import flat_names, format_table
from zslflax.evaluation.test_sets import TestSet, check_test_sets, open_test_sets
from zslflax.evaluation.zero_shot import evaluate
from zslflax.inference.predictor import Predictor
from zslflax.inference.prompts import resolve_templates
from zslflax.inference.restore import read_run_config
from zslflax.saving import storage_errors, write_json
from zslflax.training.frozen_features import open_kept_features
from zslflax.training.train_state import TrainState, student_variables, teacher_variables

log = logging.getLogger("zslflax")
FOLDER = "evaluation"  # in the workdir: what `evaluate_run` measured, and its figures
OVERRIDDEN = (
    "eval.",
    "data.",
    "features.folder",
    "compilation_cache",
)  # what an evaluation may set; all else is as the run had it


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
        workdir: the folder of the run; figures go into its folder `predictions`.
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
    results = evaluate(predictors, test_sets, predictor.config, workdir / "predictions", features_of=features_of)
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


def evaluate_run(
    workdir: Path, overrides: Mapping[str, Any] | None = None, step: int | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint of a run without training: prints the table, writes evaluation/STEP.json in the workdir.

    Test sets, prompts and all else are those of the run, unless an override gives others. Where the workdir cannot be
    written, a warning says so.

    Args:
        workdir: of a training run.
        overrides: values of fields of the run's config by name, such as {"eval.sets.test.data": "folder:pets"}. A test
            set that the run did not have is added.
        step: of the checkpoint; default: the newest.

    Returns:
        The metrics by flat name, which are also printed as a line of JSON.

    Raises:
        UserError: there is no such checkpoint, an override is none of an evaluation, or nothing can be measured.
    """
    config = read_run_config(workdir)
    override(config, overrides or {})
    test_sets = open_checked_test_sets(config)
    restore = functools.partial(Predictor.restore, workdir, cache=config.eval.class_cache)
    predictors = {"": restore(step=step)}
    if keeps_average(config):
        predictors["student"] = restore(step=predictors[""].step, use="student")
    return measure(predictors, test_sets, config, workdir, workdir)


def evaluate_model(
    model: str, workdir: Path, overrides: Mapping[str, Any] | None = None, config: ConfigDict | None = None
) -> dict[str, float]:
    """Evaluates an exported or published model, as `Predictor.restore` takes it, as `evaluate_run` does a checkpoint.

    The model prepares images in its own way, unless an override of `eval.resize_factor` or `eval.interpolation` says
    otherwise.

    Args:
        model: a folder, or an id on the Hugging Face Hub.
        workdir: the folder in which evaluation/STEP.json is written.
        overrides: values of fields of eval and data by name, such as {"eval.sets.test.data": "folder:pets"}.
        config: gives test sets and prompts; None: the overrides alone give test sets, and the model the prompts.

    Raises:
        UserError: there is no such model, an override is none of an evaluation, or nothing can be measured.
    """
    overrides = overrides or {}
    if ignored := [field for field in overrides if not field.startswith(OVERRIDDEN)]:
        raise UserError(
            f"--config.{ignored[0]} has no effect on {model}, which is evaluated as it is; only fields of eval and "
            "data, and features.folder, can be set"
        )
    from_model = ["resize_factor", "interpolation"] + (["templates"] if config is None else [])
    config = default_config() if config is None else config.copy_and_resolve_references()
    override(config, overrides)
    test_sets = open_checked_test_sets(config)  # before the model, which may have to be downloaded
    predictor = Predictor.restore(model, cache=config.eval.class_cache)
    for field in from_model:
        if f"eval.{field}" not in overrides:
            config.eval[field] = predictor.config.eval[field]
    return measure({"": predictor}, test_sets, config, workdir, model)


def open_checked_test_sets(config: ConfigDict) -> list[TestSet]:
    """Opens the test sets of an evaluation, and checks their labels.

    Raises:
        UserError: there is none, or one cannot be used.
    """
    check_devices(config, jax.device_count())
    test_sets = open_test_sets(config)
    if not test_sets:
        raise UserError(
            "there is nothing to measure: give the data of a test set, such as "
            "--config.eval.sets.pets.data=pets:FOLDER, or of several under names of your choice; docs/your-data.md "
            "lists what is read"
        )
    check_test_sets(test_sets)
    return test_sets


def measure(
    predictors: dict[str, Predictor],
    test_sets: list[TestSet],
    config: ConfigDict,
    workdir: Path,
    model: str | Path,
) -> dict[str, float]:
    """Measures models of the same step on test sets; prints and writes the results.

    Args:
        predictors: by name: {"": what is shipped, "student": the student}.
        test_sets: from `open_test_sets`.
        config: the whole config.
        workdir: the results are written into its folder `evaluation`.
        model: the name in the log.
    """
    step = predictors[""].step
    for predictor in predictors.values():  # each takes kept features of texts; those of images are the same for all
        features_of = open_kept_features(predictor, config)
    data = {test_set.name: describe_test_set(test_set, config) for test_set in test_sets}
    for name, described in data.items():
        log.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in described.items()))
    results = evaluate(
        predictors, test_sets, config, workdir / FOLDER, config.eval.bootstrap_resamples, features_of=features_of
    )
    if not results:
        raise UserError(
            "nothing could be measured: none of eval.sets has images with captions, or with labels among its classes"
        )
    interval = ", ± half of the 95% interval" if config.eval.bootstrap_resamples else ""
    log.info("step %d of %s%s\n%s", step, model, interval, format_table(results))
    metrics = flat_names(results)
    if distributed.is_main():
        write_results(workdir / FOLDER / f"{step}.json", {"step": step, "data": data, "metrics": metrics})
        print(json.dumps({"step": step, **metrics}))
    return metrics


def override(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets fields of the config of a run for an evaluation.

    Raises:
        UserError: a field is none of `OVERRIDDEN` and has another value than in the run, or does not exist; or a value
            cannot be used.
    """
    for field, value in overrides.items():
        if field.startswith("eval.sets.") and (name := field.split(".")[2]) not in config.eval.sets:
            with config.unlocked():
                config.eval.sets[name] = eval_set()
        check_field(config, field)
        own = get_field(config, field)
        if not field.startswith(OVERRIDDEN) and value != own:
            raise UserError(
                f"--config.{field} is {value!r}, but an evaluation takes that of the run, {own!r}; only "
                "fields of eval and data, and features.folder, can be set"
            )
        config.update_from_flattened_dict({field: value})
    resolve_templates(config)
    check_eval(config)
    check_paths(config)


def describe_test_set(test_set: TestSet, config: ConfigDict) -> dict[str, Any]:
    """What is evaluated: the source, and the numbers of its samples and classes."""
    described = {"data": hide_credentials(config.eval.sets[test_set.name].data), "samples": len(test_set.source)}
    return described | ({} if test_set.label_space is None else {"classes": len(test_set.label_space)})


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes what was measured, or warns that the file cannot be written."""
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
    except StorageError as error:
        log.warning("%s; the results are above", error)
