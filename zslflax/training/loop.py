"""The training loop: step, report, evaluate, save, stop."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from zslflax import checkpoint, distributed
from zslflax.data.features import TextFeatures
from zslflax.errors import NonFiniteError
from zslflax.training.metrics import BadSampleCounter, Stopwatch, average
from zslflax.training.preemption import StopRequest
from zslflax.training.setup import Run, set_up
from zslflax.training.train_state import TrainState
from zslflax.training.workdir import check_config, lock_workdir

log = logging.getLogger("zslflax")
CONFIDENT, UNRELATED = 1.0, 0.1  # nats, and probability of the given pair: learning runs exceed at least one of them


def train(
    config,
    workdir: Path,
    changed: bool = False,
    *,
    text_features: TextFeatures | None = None,
    extra_metrics: Callable | None = None,
) -> bool:
    """Trains until `config.steps` or a request to stop; resumes from the newest checkpoint of `workdir`.

    Args:
        config: the whole config.
        workdir: the folder that the run writes to and resumes from.
        changed: lets a run continue with another config than its checkpoints were written with.
        text_features: features of the same frozen text tower, cached by an earlier run.
        extra_metrics: more to measure at each evaluation: {"": the shipped predictor, "student": the student} →
            metrics.

    Returns:
        Whether the run is complete. If not, it was asked to stop, and has saved its state.
    """
    with lock_workdir(workdir):
        check_config(config, workdir, changed)
        with checkpoint.open_manager(workdir, config.eval.best_metric) as checkpoints:
            run = set_up(
                config, workdir, checkpoints, changed, text_features=text_features, extra_metrics=extra_metrics
            )
            with contextlib.closing(run.reporter), contextlib.closing(run.profile), StopRequest() as stop:
                last, complete = train_loop(run, stop)
    if complete:
        log.info("finished %d steps; everything is in %s", config.steps, workdir)
    else:
        log.info("stopped and saved at step %d of %d; the same command continues from there", last, config.steps)
    return complete


def train_loop(run: Run, stop: StopRequest) -> tuple[int, bool]:
    """Steps from `run.state` to `config.steps`, or until a request to stop; returns the last step, and whether complete.

    Metrics since the last report are saved with the state, so that a run that was stopped between two reports continues
    to the same ones; a run that was stopped during an evaluation begins with that evaluation.
    """
    config, state, recent = run.config, run.state, run.recent_metrics
    watch, bad_samples = Stopwatch(config.batch_size), BadSampleCounter(config.data.max_bad_fraction)
    step, remaining = run.first_step, range(run.first_step + 1, config.steps + 1)
    if not report_and_save(run, step, state, recent, watch, stop):  # a resumed run may owe an evaluation
        remaining = range(0)

    for step in remaining:
        with save_on_error(run, step - 1, state, recent):
            batch, errors = watch.next(run.batches)
            bad_samples.count(errors, config.batch_size // jax.process_count())
        run.profile.before(step, state)
        state, metrics = run.train_step(state, batch)
        run.profile.after(step, metrics)
        recent.append(metrics)
        checkpoint.raise_errors(run.checkpoints)
        reported = report_and_save(run, step, state, recent, watch, stop)
        if not reported or stop.requested(step):
            break

    if int(state.failed_step) >= 0:
        stop_at_failed_step(run.checkpoints, state)
    checkpoint.save(run.checkpoints, state, recent=recent)
    checkpoint.finish(run.checkpoints)
    return step, step == config.steps and not recent


def report_and_save(
    run: Run, step: int, state: TrainState, recent: list[dict], watch: Stopwatch, stop: StopRequest
) -> bool:
    """Reports, evaluates and saves where it is time to; False if a request to stop interrupted the evaluation.

    `recent`, the metrics since the last report, is emptied by a report.
    """
    config = run.config
    evaluating = step == config.steps or step % config.eval.every == 0
    saving = evaluating or step % config.checkpoint.every == 0
    if not recent or not (saving or step % config.log_every == 0):
        return True
    results = average(recent) | watch.lap(run.train_step.flops)
    run.reporter.progress(step, results["train/loss"], results["train/pairs_per_second"])
    if results["train/failed_step"] >= 0:
        stop_at_failed_step(run.checkpoints, state)
    if evaluating:
        warn_of_collapse(config.objective, results)
        with save_on_error(run, step, state, recent):
            evaluated = stop.run_interruptible(run.evaluate, state)
        if evaluated is None:
            return False
        results |= evaluated
        watch.start()
    run.reporter.write(step, results)
    recent.clear()
    if saving:
        checkpoint.save(run.checkpoints, state, results if evaluating else None)
    return True


@contextlib.contextmanager
def save_on_error(run: Run, step: int, state: TrainState, recent: list[dict]) -> Iterator[None]:
    """Saves the state before an error ends the run: for what may fail while the state is sound.

    With several processes, one of them alone may have failed and a save needs all: they go back to the last checkpoint.
    """
    try:
        yield
    except Exception:
        if step > run.first_step and not distributed.is_multi_process():
            try:
                checkpoint.save(run.checkpoints, state, recent=recent)
                checkpoint.finish(run.checkpoints)
                log.error("step %d is saved; the same command continues from there", step)
            except OSError as error:
                log.error("%s", error)
        raise


def warn_of_collapse(objective, metrics: dict[str, float]) -> None:
    """Warns when the soft labels are confident but rarely on the true pair: they name the same few captions for all.

    An untrained teacher finds some captions nearest to every image. Believed at a low temperature, the student learns
    just that, and so does its average (docs/study.md, "A cold start").
    """
    confident = metrics.get("train/soft_entropy", math.inf) < CONFIDENT
    if confident and metrics["train/soft_on_pair"] < UNRELATED and not objective.remove_diagonal:
        log.warning(
            "the soft labels are confident (entropy %.2f nats) but put only %.3f on the given pairs: they may name the "
            "same few captions for all images. If hit@k does not rise, start again with a higher "
            "objective.teacher_temperature (now %g; 0.05 suits towers that start from scratch)",
            metrics["train/soft_entropy"],
            metrics["train/soft_on_pair"],
            objective.teacher_temperature,
        )


def stop_at_failed_step(checkpoints, state: TrainState) -> None:
    """Saves the state as it was before the first non-finite step that was not skipped, and raises."""
    checkpoint.save(checkpoints, state.replace(failed_step=jnp.full((), -1, jnp.int32)))
    checkpoint.finish(checkpoints)
    step, skipped = int(state.failed_step), int(state.nonfinite_steps)
    before = f", after {skipped} that were skipped" if skipped else ""
    raise NonFiniteError(
        f"the loss, the gradient or the update of step {step + 1} is not finite{before}; "
        f"the state before it is saved as step {step}. "
        "Lower optimizer.learning_rate, set optimizer.clip_norm, or use compute_dtype float32"
    )
