"""The training loop and nothing else: restore, step, report, evaluate, save."""

import contextlib
import difflib
import functools
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zslflax import checkpoint, export, feed, objectives, optimizer, parallel, predict
from zslflax import evaluate as evaluation
from zslflax import state as states
from zslflax import workdir as workdirs
from zslflax.config import profiled_steps
from zslflax.data import exclude, pairs
from zslflax.models import pretrained
from zslflax.predict import Predictor
from zslflax.stop import Stop
from zslflax.telemetry import BadSamples, Profile, Reporter, Stopwatch, average

log = logging.getLogger("zslflax")
SURE, UNRELATED = 1.0, 0.1  # nats, and probability of the given pair: runs that learn have the one or exceed the other


def train(config, workdir: Path, changed: bool = False, *, text_features=None, measure=None) -> bool:
    """Trains until `config.steps` or a request to stop, from the newest checkpoint in `workdir` where there is one.

    Start-up takes the parameters from, in this order:
        1. the newest checkpoint of `workdir` that is whole;
        2. the pretrained towers that the config names, the rest at random from `config.seed`.

    Args:
        config: the whole config.
        workdir: where the run writes, and where it resumes.
        changed: lets a run go on whose config differs from that of the checkpoint.
        text_features: of a text tower that is frozen for ever, what earlier runs with the same one have kept.
        measure: more to find out at each evaluation, from {"": the shipped predictor, "student/": the student} to
            metrics.

    Returns:
        whether the run is complete; if not, it was asked to stop, and has saved its state.
    """
    with workdirs.locked(workdir):
        workdirs.check(config, workdir, changed)
        return restore_and_train(config, workdir, changed, text_features, measure)


def restore_and_train(config, workdir: Path, changed: bool, text_features=None, measure=None) -> bool:
    """Puts everything together for `take_steps`."""
    model, tokenizer = predict.build_model(config)
    teacher_model, teacher = load_teacher(config, tokenizer)
    sources = [pairs.open_source(spec, config.data, "train") for spec in config.data.train]
    sources = exclude.leave_out(sources, config.data.exclude)
    parallel.check_same_on_hosts("the number of training samples", list(map(len, sources)))
    test_sets = evaluation.open_sets(config)
    with checkpoint.opened(workdir, config.eval.best) as checkpoints:
        resuming, recent = checkpoints.latest_step() is not None, []
        state, tx, frozen = create_state(config, model, pretrained_weights=not resuming)
        if resuming:
            state = checkpoint.restore_newest(checkpoints, state)
            recent = checkpoint.recent_metrics(workdir, int(state.step))
            log.info("resuming from step %d in %s", state.step, workdir)
        if int(state.step) > config.steps:
            raise ValueError(f"config: steps is {config.steps}, but {workdir} is at step {int(state.step)} already")
        if parallel.is_main() and (changed or not resuming):
            export.save_text_encoder(config, tokenizer, workdir / export.TEXT_FOLDER)
        workdirs.keep_config(config, workdir)
        describe(config, state, frozen, sources)
        teacher = parallel.replicate(states.without_shared(teacher, state.params, frozen))

        first, text_features = int(state.step), text_features or feed.kept_text_features(config, model, state, frozen)
        batches = feed.train_batches(config, sources, tokenizer, first)
        if "text" in frozen and config.model.text.keep_features:
            batches = feed.with_text_features(batches, text_features)
        elif config.model.text.pack:
            batches = feed.with_packed_text(config, sources, tokenizer, batches)
        fixed = dict(model=model, tx=tx, config=config, frozen=frozen, teacher_model=teacher_model)
        step, batches = parallel.TrainStep(teacher, **fixed), parallel.to_devices(batches)
        predictor = Predictor(config, model, None, tokenizer, text_features=text_features)
        evaluate_state = functools.partial(evaluate_train_state, predictor, test_sets, workdir, measure)
        reporter = Reporter(workdir, first - len(recent), config.steps, parallel.is_main())
        profile = Profile(profiled_steps(config) if parallel.is_main() else None, workdir / "profile")
        with contextlib.closing(reporter), contextlib.closing(profile), Stop() as stop:
            last, complete = take_steps(
                config, state, recent, step, batches, evaluate_state, checkpoints, reporter, profile, stop
            )
    if complete:
        log.info("finished %d steps; everything is in %s", config.steps, workdir)
    else:
        log.info("stopped and saved at step %d of %d; the same command goes on from there", last, config.steps)
    return complete


def take_steps(config, state, recent, update, batches, evaluate_state, checkpoints, reporter, profile, stop: Stop):
    """The steps from `state` to `config.steps`, or until `stop`; their metrics, evaluations and checkpoints on the way.

    `recent` are the metrics of the steps since the last report. They are saved with the state, so that a run that was
    stopped between two reports goes on to the same ones; if it was stopped during an evaluation, that comes first.
    Returns the last step, and whether the run is complete.
    """
    first, watch, bad = int(state.step), Stopwatch(config.batch_size), BadSamples(config.data.max_bad)
    for step in range(first, config.steps + 1):
        if step > first:
            with saved_on_error(checkpoints, state, recent, first):
                batch, errors = watch.next(batches)
                bad.count(errors, config.batch_size // jax.process_count())
            state, metrics = profile.step(step, update, state, batch)
            recent.append(metrics)
        checkpoint.raise_errors(checkpoints)
        evaluating = step == config.steps or step % config.eval.every == 0
        saving = evaluating or step % config.checkpoint.every == 0
        if recent and (saving or step % config.report_every == 0):
            results = average(recent) | watch.lap(update.flops)
            reporter.progress(step, results["train/loss"], results["train/pairs_per_second"])
            if results["train/bad_step"] >= 0:
                stop_at_bad_step(checkpoints, state)
            if evaluating:
                warn_of_collapse(config.objective, results)
                with saved_on_error(checkpoints, state, recent, first):
                    evaluated = stop.unless_asked(evaluate_state, state)
                if evaluated is None:
                    break
                results |= evaluated
                watch.start()
            reporter.write(step, results)
            recent = []
            if saving:
                checkpoint.save(checkpoints, state, results if evaluating else None)
        if stop.at(step):
            break
    if int(state.bad_step) >= 0:
        stop_at_bad_step(checkpoints, state)
    checkpoint.save(checkpoints, state, recent=recent)
    checkpoint.finish(checkpoints)
    return step, step == config.steps and not recent


@contextlib.contextmanager
def saved_on_error(checkpoints, state, recent, first: int):
    """Around what may fail while the state is sound: the steps since `first` are saved before the error goes on.

    Of several processes one alone may have failed, and a save takes all: they go back to the last checkpoint.
    """
    try:
        yield
    except Exception:
        if int(state.step) > first and not parallel.several():
            try:
                checkpoint.save(checkpoints, state, recent=recent)
                checkpoint.finish(checkpoints)
                log.error("step %d is saved; the same command goes on from there", int(state.step))
            except OSError as error:
                log.error("%s", error)
        raise


def evaluate(config, workdir: Path, step: int | None = None) -> dict[str, float]:
    """Evaluates a checkpoint of `workdir` (default: the newest) without training; prints and returns the metrics.

    The model is what the workdir's own config.json says; the test sets are those of `config`.
    """
    test_sets = evaluation.open_sets(config)
    restore = functools.partial(Predictor.restore, workdir, step=step, cache=config.eval.cache)
    predictors = {"": restore()}
    if predictors[""].config.teacher.kind == "ema":
        predictors["student/"] = restore(step=predictors[""].step, use="student")
    metrics = evaluation.evaluate(predictors, test_sets, config, workdir, config.eval.resamples)
    if not metrics:
        raise ValueError(
            "nothing could be measured: none of eval.sets has images with captions, or with labels among its classes"
            if test_sets
            else "there is nothing to measure: give the data of a test set, such as eval.sets.test.data"
        )
    step = predictors[""].step
    log.info("step %d of %s\n%s", step, workdir, evaluation.table(metrics))
    if parallel.is_main():
        print(json.dumps({"step": step, **metrics}))
    return metrics


def create_state(config, model, *, pretrained_weights: bool):
    """The state before the first step, the optimiser, and the modalities whose tower is frozen for ever."""
    size, tokens = config.model.image.size, config.model.text.max_tokens
    example = (jnp.zeros((1, size, size, 3), jnp.uint8), jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens), bool))
    key, scalars = jax.random.key(config.seed), objectives.init_params(config.objective)
    shapes = {**jax.eval_shape(model.init, key, *example)["params"], "objective": scalars}
    tx = optimizer.build(config, shapes, config.steps)  # refuses what names no parameter before any is made
    frozen = optimizer.frozen_towers(shapes, config.freeze)
    variables = jax.jit(model.init)(key, *example)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    if pretrained_weights:
        variables = import_towers(config, variables)
    params = {**variables["params"], "objective": scalars}
    state = states.create({**variables, "params": params}, tx, ema=config.teacher.kind == "ema", frozen=frozen)
    return parallel.replicate(state), tx, frozen  # placed as the step returns it, or it would be compiled twice


def import_towers(config, variables):
    """Puts the pretrained towers that the config names in the place of the random ones."""
    image, text = config.model.image, config.model.text
    params, batch_stats = variables["params"], dict(variables["batch_stats"])
    if image.pretrained:
        tower = {"params": params["image"]["tower"], "batch_stats": batch_stats.get("image", {}).get("tower", {})}
        tower = pretrained.load_image(pretrained.locate(image.pretrained), image.name, tower, image.size)
        params = states.merge(params, {"image": {"tower": tower["params"]}})
        if batch_stats:
            batch_stats["image"] = {"tower": tower["batch_stats"]}
    if text.pretrained:
        tower = pretrained.load_text(pretrained.locate(text.pretrained), {"params": params["text"]["tower"]})
        params = states.merge(params, {"text": {"tower": tower["params"]}})
    return {"params": params, "batch_stats": batch_stats}


def load_teacher(config, tokenizer):
    """The frozen teacher of teacher.kind "checkpoint": its model and variables; (None, {}) for any other kind."""
    if config.teacher.kind != "checkpoint":
        return None, {}
    taught = Predictor.restore(config.teacher.workdir)
    if taught.tokenizer.identity != tokenizer.identity:
        raise ValueError(
            f"the teacher in {config.teacher.workdir} reads captions with the tokenizer {taught.tokenizer.identity}, "
            f"the student with {tokenizer.identity}; both see the same tokens, so give the student the teacher's "
            "tokenizer (model.text.tokenizer, model.text.max_tokens)"
        )
    if taught.config.model.image.size != config.model.image.size:
        raise ValueError(
            f"the teacher in {config.teacher.workdir} sees images of {taught.config.model.image.size} pixels, the "
            f"student of {config.model.image.size}; set model.image.size to the teacher's"
        )
    log.info("teacher: step %d of %s, frozen", taught.step, config.teacher.workdir)
    return taught.model, taught.variables


def describe(config, state, frozen: tuple[str, ...], sources) -> None:
    """Logs what is going to be trained, on what."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree)) / 1e6
    log.info(
        "%s: image tower %s %.1fM parameters%s, text tower %.1fM%s; %s",
        config.name,
        config.model.image.name,
        count(state.params["image"]["tower"]),
        " (frozen)" if "image" in frozen else "",
        count(state.params["text"]["tower"]),
        " (frozen)" if "text" in frozen else "",
        config.objective.name,
    )
    log.info(
        "%s pairs, batches of %d on %d %s device(s), %d steps",
        f"{sum(map(len, sources)):,}",
        config.batch_size,
        jax.device_count(),
        jax.default_backend(),
        config.steps,
    )


def evaluate_train_state(predictor: Predictor, test_sets, workdir: Path, measure, state) -> dict[str, float]:
    """Evaluates the teacher and the student as they are; without an EMA there is only the student."""
    step = int(state.step)
    predictors = {"": predictor.with_variables(states.student_variables(state), step)}
    if state.teacher_params:
        teacher = predictor.with_variables(states.teacher_variables(state), step)
        predictors = {"": teacher, "student/": predictors[""]}
    metrics = evaluation.evaluate(predictors, test_sets, predictor.config, workdir)
    if metrics:
        log.info("step %d\n%s", step, evaluation.table(metrics))
    metrics |= measure(predictors) if measure else {}
    if (best := predictor.config.eval.best) and best not in metrics:
        near = ", ".join(difflib.get_close_matches(best, metrics, n=3, cutoff=0.0)) or "none, for nothing is evaluated"
        raise ValueError(f"config: eval.best is {best!r}, which no evaluation gives; nearest: {near}")
    return metrics


def warn_of_collapse(objective, metrics: dict[str, float]) -> None:
    """Says so where soft labels are sure, and hardly ever of the given pair: they name the same few captions for all.

    A teacher that knows nothing yet finds some captions nearest to every image. Where it is believed at a low
    temperature, the student learns just that, and so does its average (docs/study.md, "A cold start").
    """
    sure = metrics.get("train/soft_entropy", np.inf) < SURE
    if sure and metrics["train/soft_on_pair"] < UNRELATED and not objective.remove_diagonal:
        log.warning(
            "the soft labels are sure (entropy %.2f nats), but put %.3f on the given pairs: they may name the same few "
            "captions for all images. If hit@k does not rise, start anew with a higher objective.teacher_temperature "
            "(now %g; 0.05 suits towers that start from scratch)",
            metrics["train/soft_entropy"],
            metrics["train/soft_on_pair"],
            objective.teacher_temperature,
        )


def stop_at_bad_step(checkpoints, state) -> None:
    """Saves the state as it was before the first step that was not finite, and ends the run."""
    checkpoint.save(checkpoints, state.replace(bad_step=jnp.full((), -1, jnp.int32)))
    checkpoint.finish(checkpoints)
    step, dropped = int(state.bad_step), int(state.bad_steps)
    before = f", after {dropped} that were dropped" if dropped else ""
    raise FloatingPointError(
        f"the loss, the gradient or the update of step {step + 1} is not finite{before}; "
        f"the state before it is saved as step {step}. "
        "Lower optimizer.learning_rate, set optimizer.clip_norm, or use compute_dtype float32"
    )
