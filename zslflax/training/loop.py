"""The training loop: step, report, evaluate, save, stop."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax import checkpoint, distributed
from zslflax.data.sources.base import Source
from zslflax.data.text_features import TextFeatures
from zslflax.errors import NonFiniteError, device_memory_errors
from zslflax.inference.predictor import Predictor
from zslflax.models.build import resolve_model
from zslflax.training.classes import needs_class_names, resolve_class_names
from zslflax.training.metrics import BadSampleCounter, average
from zslflax.training.optimizer import schedule
from zslflax.training.preemption import StopRequest
from zslflax.training.setup import Run, open_sources, set_up
from zslflax.training.startup import StartupTimes, process_age
from zslflax.training.step import Metrics
from zslflax.training.stopwatch import Stopwatch
from zslflax.training.train_state import TrainState
from zslflax.training.workdir import check_config, check_writable, lock_workdir

log = logging.getLogger("zslflax")
# Steps that may be dispatched before an earlier one is done. Each holds its batch in device memory. With several CPU
# devices, XLA waits for ever once 32 steps with collectives are in flight (jaxlib 0.10).
STEPS_AHEAD = 2
CONFIDENT, UNRELATED = 1.0, 0.1  # nats, and probability of the given pair: learning runs exceed at least one of them


def train(
    config: ConfigDict,
    workdir: Path,
    changed: bool = False,
    *,
    sources: Sequence[Source] | None = None,
    text_features: TextFeatures | None = None,
    extra_metrics: Callable[[dict[str, Predictor]], dict[str, float]] | None = None,
) -> bool:
    """Trains until `config.steps` or a request to stop; resumes from the newest checkpoint of `workdir`.

    Args:
        config: the whole config.
        workdir: the folder that the run writes to and resumes from.
        changed: lets a run continue with another config than its checkpoints were written with.
        sources: the training data, one source for each name in `config.data.train`; None opens what is named there.
        text_features: features of the same frozen text tower, cached by an earlier run.
        extra_metrics: called at each evaluation with {"": the shipped predictor, "student": the student}, if there is
            an EMA; returns more metrics.

    Returns:
        Whether the run is complete. If not, it was asked to stop, and has saved its state.

    Raises:
        UserError: the config, the data or the workdir is wrong, or a step is not finite (`NonFiniteError`).
    """
    startup = StartupTimes(process_age())
    config = config.copy_and_resolve_references()
    if sources is None and needs_class_names(config):
        sources = open_sources(config)
    config.model.class_names = resolve_class_names(config, sources)
    config.model = resolve_model(config.model)
    checkpoint.check_path(workdir)
    with lock_workdir(workdir):
        check_config(config, workdir, changed)
        check_writable(workdir)
        with checkpoint.open_manager(workdir, config.eval.best_metric) as checkpoints:
            run = set_up(
                config,
                workdir,
                checkpoints,
                changed,
                sources=sources,
                text_features=text_features,
                extra_metrics=extra_metrics,
                startup=startup,
            )
            with run.batches, contextlib.closing(run.reporter), contextlib.closing(run.profile), StopRequest() as stop:
                with device_memory_errors(memory_advice(config, run.state)):
                    last_step, complete = train_loop(run, stop)
    if complete:
        log.info("finished %d steps; everything is in %s", config.steps, workdir)
    else:
        rest = "continues from there" if last_step < config.steps else "makes the evaluation that is left"
        log.info("stopped and saved at step %d of %d; the same command %s", last_step, config.steps, rest)
    return complete


def train_loop(run: Run, stop: StopRequest) -> tuple[int, bool]:
    """Steps from `run.state` to `config.steps`, or until a request to stop.

    Metrics since the last report are saved with the state, so that a run that was stopped between two reports continues
    to the same ones. A run that was stopped during an evaluation begins with that evaluation.

    Returns:
        The last step, and whether the run is complete.
    """
    config, step, state, train_step = run.config, run.first_step, run.state, run.train_step
    watch, bad_samples = Stopwatch(config.batch_size), BadSampleCounter(config.data.max_bad_fraction)
    stopping = not report_and_save(run, step, state, watch, stop)  # a resumed run may owe an evaluation
    metrics = None

    while step < config.steps and not stopping:
        with save_on_error(run, step, state):
            first = run.startup.phase("the first batch") if metrics is None else contextlib.nullcontext()
            with first:
                batch, errors = watch.next(run.batches, metrics)
            bad_samples.count(errors, config.batch_size // jax.process_count())
        step += 1
        run.profile.before(step, state)
        state, metrics = take_first_step(run, state, batch) if step == run.first_step + 1 else train_step(state, batch)
        run.profile.after(step, metrics)
        run.reporter.step(step)
        run.recent_metrics.append(metrics)
        jax.block_until_ready(run.recent_metrics[-1 - STEPS_AHEAD : -STEPS_AHEAD])
        checkpoint.check_for_errors(run.checkpoints)
        stopping = not report_and_save(run, step, state, watch, stop) or stop.requested(step)

    raise_if_failed(run, state)
    save_and_wait(run, state)
    return step, step == config.steps and not run.recent_metrics


def memory_advice(config: ConfigDict, state: TrainState) -> str:
    """What to change where a step does not fit into the memory of a device."""
    share = config.batch_size // jax.device_count()
    size = config.micro_batch or share
    smaller = max((n for n in range(1, size // 2 + 1) if share % n == 0), default=0)
    changes = [f"micro_batch={smaller}, with which the update stays that of the whole batch"] if smaller else []
    trained = [modality for modality in ("image", "text") if "tower" in state.params.get(modality, {})]
    changes += [
        f"model.{modality}.remat=True, for a third more computation"
        for modality in trained
        if not config.model[modality].remat
    ]
    return f"a device embeds {size} pairs at a time. Set {'; or '.join([*changes, 'a smaller batch_size'])}"


def take_first_step(run: Run, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    """The run's first step, which is compiled, and the log of the times that the start took."""
    log.info("compiling the train step; this can take minutes the first time")
    with run.startup.phase("compiling and the first step"):
        state, metrics = run.train_step(state, batch)
        jax.block_until_ready(metrics)
    run.startup.report()
    return state, metrics


def report_and_save(run: Run, step: int, state: TrainState, watch: Stopwatch, stop: StopRequest) -> bool:
    """Reports, evaluates and saves if the config says so for this step. A report clears `run.recent_metrics`.

    Returns:
        False if a request to stop interrupted the evaluation.
    """
    config = run.config
    evaluating = step in (config.eval.first, config.steps) or step % config.eval.every == 0
    saving = evaluating or step % config.checkpoint.every == 0
    if not run.recent_metrics or not (saving or step % config.log_every == 0):
        return True
    in_first_pass = (step - watch.steps) * config.batch_size < run.first_pass  # some of the steps since the last lap
    rates = watch.lap(run.train_step.flops, computing_features=in_first_pass)
    results = average(run.recent_metrics) | rates
    results["train/learning_rate"] = float(schedule(config.optimizer, config.steps)(step - 1))
    run.reporter.progress(step, results["train/loss"], results["train/pairs_per_second"])
    raise_if_failed(run, state)
    if evaluating:
        warn_of_collapse(config.objective, results)
        advice = f"lower eval.batch_size, which is {config.eval.batch_size}"
        with save_on_error(run, step, state), device_memory_errors(advice):
            eval_metrics = stop.run_interruptible(run.evaluate, state)
        if eval_metrics is None:
            return False
        results |= eval_metrics
        watch.start()
    with save_on_error(run, step, state):
        run.reporter.write(step, results)
        if evaluating:
            run.reporter.write_figures(step)
    run.recent_metrics.clear()
    if saving:
        checkpoint.save(run.checkpoints, state, results if evaluating else None)
    return True


@contextlib.contextmanager
def save_on_error(run: Run, step: int, state: TrainState) -> Iterator[None]:
    """Saves the state of a step if the block fails, for operations that may fail while the state is sound.

    In a multi-process run, one process alone may have failed and a save needs all of them, so nothing is saved.
    """
    try:
        yield
    except Exception:
        if step > run.first_step and not distributed.is_multi_process():
            raise_if_failed(run, state)
            try:
                save_and_wait(run, state)
                log.error("step %d is saved; the same command continues from there", step)
            except OSError as error:
                log.error("%s", error)
        raise


def save_and_wait(run: Run, state: TrainState) -> None:
    """Saves the state with the metrics since the last report, and waits until it is found on the disk."""
    checkpoint.save(run.checkpoints, state, recent_metrics=run.recent_metrics)
    checkpoint.wait_until_finished(run.checkpoints)
    distributed.on_main(lambda: checkpoint.check_saved(run.checkpoints, int(state.step)))


def raise_if_failed(run: Run, state: TrainState) -> None:
    """Raises a NonFiniteError if there was a non-finite step that could not be skipped; saves the state before it."""
    if int(state.failed_step) < 0:
        return
    run.recent_metrics.clear()
    save_and_wait(run, state.replace(failed_step=jnp.full((), -1, jnp.int32)))
    step, skipped = int(state.failed_step), int(state.nonfinite_steps)
    before = f", after {skipped} that were skipped" if skipped else ""
    raise NonFiniteError(
        f"the loss, the gradient or the update of step {step + 1} is not finite{before}; "
        f"the state before it is saved as step {step}. "
        "Lower optimizer.learning_rate, set optimizer.clip_norm, or use compute_dtype float32"
    )


def warn_of_collapse(objective: ConfigDict, metrics: dict[str, float]) -> None:
    """Warns when the soft labels are confident but rarely on the true pair: they name the same few captions for all.

    An untrained teacher finds some captions nearest to every image. With a low temperature, the student learns these
    labels, and so does its average (docs/study.md, "A cold start").
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
