"""One training step: forward, loss, gradient, update, teacher. Read it beside losses/contrastive.py."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zslflax.distributed import AXIS
from zslflax.losses.contrastive import (
    LOG_LOGIT_SCALE_RANGE,
    OBJECTIVES,
    Embeddings,
    join,
    pair_losses,
    split,
)
from zslflax.models.partition import combine
from zslflax.training import flops
from zslflax.training.train_state import (
    TrainState,
    Tree,
    student_variables,
    teacher_variables,
    towers,
    update_ema,
)

MODALITIES = ("image", "text")


def train_step(
    state: TrainState, fixed_teacher: Tree, batch: dict[str, jax.Array], *, model, teacher_model, tx, config
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one global batch, of which this device holds b pairs.

    N devices compute what one device would on the same global batch: gathered negatives keep their gradient, batch
    normalisation is synchronised, and the loss is divided by the number of valid pairs of the global batch.

    With `config.micro_batch` the towers run on that many pairs at a time and the update is still that of the whole
    batch, except for what couples pairs inside a tower: batch normalisation uses the statistics of a micro-batch (of all
    devices' i-th together), its running statistics move once a step by the mean over micro-batches, and dropout is drawn
    for each micro-batch.

    Args:
        state: the same on every device.
        fixed_teacher: variables of the teacher from a checkpoint, as `teacher_variables` takes them; {} otherwise.
        batch: `image` uint8 [b, s, s, 3], `text` int32 [b, t], `text_mask` bool [b, t], `valid` bool [b]. Text may be
            packed instead (`data.packing`), each micro-batch by itself. A frozen tower's output `image_features` or
            `text_features` fp32 [b, f] may stand in for its input.
        model: the student's `TwoTower`. teacher_model: the teacher's, the same for an EMA.
        tx: the optimiser, from `build_optimizer`.
        config: the whole config.

    Returns:
        The next state; and metrics, fp32 scalars averaged over the valid pairs of the global batch. `truncated` is a
        number of pairs; `nonfinite_steps` and `failed_step` are int32, as in the state.
    """
    valid = batch["valid"].astype(jnp.float32)  # (b,)
    num_pairs = jnp.maximum(jax.lax.psum(jnp.sum(valid), AXIS), 1.0)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), jax.lax.axis_index(AXIS))
    num_micro_batches = len(valid) // (config.micro_batch or len(valid))

    fixed = functools.partial(no_grad_outputs, state, fixed_teacher, model, teacher_model, config)
    frozen_features, teacher_emb = map_micro_batches(fixed, batch, num_micro_batches)

    def embed_student(params, inputs, key):
        micro_batch, features = inputs
        variables = {**student_variables(state), "params": combine(params, state.frozen_params)}
        return embed(model, variables, micro_batch, features, train=MODALITIES, rngs={"dropout": key})

    def loss_fn(objective_params, student_emb):
        losses = pair_losses(
            config.objective,
            objective_params,
            student_emb,
            teacher_emb,
            batch["valid"],
            step=state.step,
            axis_name=AXIS,
        )
        means = jax.tree.map(lambda x: jnp.sum(valid * x) / num_pairs, losses)  # this device's part of the mean
        return means["loss"], means

    grads, metrics, batch_stats = compute_gradients(
        embed_student, loss_fn, state.params, (batch, frozen_features), key, num_micro_batches
    )
    grads, metrics = jax.lax.psum((grads, metrics), AXIS)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = clip_logit_scales(optax.apply_updates(state.params, updates))
    new_state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
    if config.teacher.kind == "ema":
        teacher_params, teacher_batch_stats = update_ema(
            (state.teacher_params, state.teacher_batch_stats),
            (towers(params), batch_stats),
            config.teacher.ema_decay,
            new_state.step,
        )
        new_state = new_state.replace(teacher_params=teacher_params, teacher_batch_stats=teacher_batch_stats)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    state = keep_finite(state, new_state, finite, config.optimizer.max_nonfinite_steps)
    metrics |= logit_scales(state.params["objective"]) | {"grad_norm": grad_norm, "pairs": num_pairs}
    metrics |= {"nonfinite_steps": state.nonfinite_steps, "failed_step": state.failed_step}
    if "text_truncated" in batch:
        metrics["truncated"] = jax.lax.psum(jnp.sum(batch["text_truncated"].astype(jnp.float32)), AXIS)
    return state, metrics


def no_grad_outputs(
    state: TrainState, fixed_teacher: Tree, model, teacher_model, config, batch
) -> tuple[dict[str, jax.Array], Embeddings | None]:
    """What needs no gradient: the frozen towers' outputs by modality, and the teacher's embeddings (or None).

    The teacher shares the outputs of the towers that are the student's own frozen ones.
    """
    student = student_variables(state)
    frozen_features = {
        modality: batch[f"{modality}_features"]
        if f"{modality}_features" in batch
        else tower_features(model, student, batch, modality, train=False)[0]
        for modality in state.frozen_params
    }
    if not OBJECTIVES[config.objective.name].needs_teacher:
        return frozen_features, None
    teacher = teacher_variables(state, fixed_teacher, config.teacher.batch_norm)
    own_towers = fixed_teacher["params"] if fixed_teacher else {}
    shared = {m: x for m, x in frozen_features.items() if "tower" not in own_towers.get(m, {})}
    batch_norm_by_batch = config.teacher.batch_norm == "batch" and not fixed_teacher and bool(teacher["batch_stats"])
    train = ("image",) if batch_norm_by_batch else ()
    return frozen_features, embed(teacher_model, teacher, batch, shared, train=train)[0]


def tower_features(
    model, variables: Tree, batch, modality: str, *, train: bool, rngs: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, Tree]:
    """One tower's output fp32 [b, f] for this device's pairs, and the batch statistics after it."""
    method = f"{modality}_features"
    if modality == "image":
        inputs = (batch["image"],)
    elif "text_segment" in batch:
        inputs = batch["text"], batch["text_segment"], batch["text_position"], len(batch["valid"])
        method = "packed_text_features"
    else:
        inputs = batch["text"], batch["text_mask"]
    if not train:
        return model.apply(variables, *inputs, train=False, method=method), variables["batch_stats"]
    outputs, updated = model.apply(variables, *inputs, train=True, method=method, mutable=["batch_stats"], rngs=rngs)
    return outputs, {**variables["batch_stats"], **updated.get("batch_stats", {})}


def embed(
    model,
    variables: Tree,
    batch,
    features: dict[str, jax.Array],
    *,
    train: tuple[str, ...],
    rngs: dict[str, jax.Array] | None = None,
) -> tuple[Embeddings, Tree]:
    """Unit embeddings of this device's pairs, and the batch statistics after them.

    Args:
        features: outputs of towers that need not run, by modality.
        train: the modalities whose tower runs in training mode (batch statistics, dropout).
    """
    features, batch_stats = dict(features), variables["batch_stats"]
    for modality in MODALITIES:
        if modality not in features:
            current = {**variables, "batch_stats": batch_stats}
            features[modality], batch_stats = tower_features(
                model, current, batch, modality, train=modality in train, rngs=rngs
            )
    image_emb = model.apply(variables, features["image"], method="project_image")
    text_emb = model.apply(variables, features["text"], method="project_text")
    return Embeddings(image_emb, text_emb), batch_stats


def compute_gradients(
    embed: Callable, loss_fn: Callable, params: Tree, inputs: Tree, key: jax.Array, num_micro_batches: int
) -> tuple[Tree, dict[str, jax.Array], Tree]:
    """The gradient of loss_fn(params["objective"], v) by `params`, where v = embed(params, inputs, key) are embeddings.

    With one micro-batch, all activations are kept for the backward pass. With several, those of one at a time are, as in
    GradCache (Gao et al. 2021, arXiv 2101.06983): by the chain rule

        d loss / d params = Σ_i (d v_i / d params)ᵀ · d loss / d v_i,

    first all v are computed without activations, then the gradient of the loss by v, then each micro-batch once more
    with its part of that gradient. Both passes draw the same dropout. The sum is fp32.

    Args:
        embed: (params, inputs, key) → (`Embeddings` [b, d], batch statistics).
        loss_fn: (params["objective"], `Embeddings` of all of this device's pairs) → (scalar, metrics).
        inputs: a tree of arrays, whose lengths `num_micro_batches` divides.

    Returns:
        The gradient, the metrics of `loss_fn`, and the batch statistics (of several micro-batches, their mean).
    """
    if num_micro_batches == 1:

        def embed_and_loss(params):
            student_emb, batch_stats = embed(params, inputs, key)
            loss, metrics = loss_fn(params["objective"], student_emb)
            return loss, (metrics, batch_stats)

        grads, (metrics, batch_stats) = jax.grad(embed_and_loss, has_aux=True)(params)
        return grads, metrics, batch_stats

    micro_batches = split(inputs, num_micro_batches), jax.random.split(key, num_micro_batches)
    student_emb, batch_stats = jax.lax.map(lambda inputs: embed(params, *inputs), micro_batches)
    (objective_grads, emb_grads), metrics = jax.grad(loss_fn, (0, 1), has_aux=True)(
        params["objective"], join(student_emb)
    )

    def add_micro_batch(total, inputs_and_grads):
        inputs, emb_grad = inputs_and_grads
        _, vjp_fn, _ = jax.vjp(lambda params: embed(params, *inputs), params, has_aux=True)
        return jax.tree.map(jnp.add, total, *vjp_fn(emb_grad)), None

    zero = jax.tree.map(jnp.zeros_like, params) | {"objective": objective_grads}
    grads, _ = jax.lax.scan(add_micro_batch, zero, (micro_batches, split(emb_grads, num_micro_batches)))
    # x_0 + mean(x_i − x_0) leaves statistics that do not change exactly as they are.
    batch_stats = jax.tree.map(lambda x: x[0] + jnp.mean(x - x[0], axis=0), batch_stats)
    return grads, metrics, batch_stats


def map_micro_batches(function: Callable, inputs: Tree, num_micro_batches: int) -> Tree:
    """function(inputs), computed on one micro-batch after another."""
    return function(inputs) if num_micro_batches == 1 else join(jax.lax.map(function, split(inputs, num_micro_batches)))


def keep_finite(state: TrainState, new_state: TrainState, finite: jax.Array, max_nonfinite: int) -> TrainState:
    """`new_state` after a finite step; else `state`, counted on by one step; unchanged once too many were not finite."""
    tolerated = state.nonfinite_steps < max_nonfinite
    skipped = state.replace(
        step=jnp.where(tolerated, state.step + 1, state.step),
        nonfinite_steps=jnp.where(tolerated, state.nonfinite_steps + 1, state.nonfinite_steps),
        failed_step=jnp.where(tolerated, state.failed_step, state.step),
    )
    next_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, skipped)
    return jax.tree.map(lambda new, old: jnp.where(state.failed_step < 0, new, old), next_state, state)


def clip_logit_scales(params: Tree) -> Tree:
    """Clips the learnt log-scales to their range after the update; a clip in the forward pass would stop gradients."""
    clipped = {
        name: jnp.clip(value, *LOG_LOGIT_SCALE_RANGE) if name.endswith("logit_scale") else value
        for name, value in params["objective"].items()
    }
    return {**params, "objective": clipped}


def logit_scales(objective_params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The learnt logit scales, exponentials of the parameters `log_…`."""
    return {
        name.removeprefix("log_"): jnp.exp(value) for name, value in objective_params.items() if name.startswith("log_")
    }


class TrainStep:
    """`train_step` over all devices: (state, batch) → (state, metrics).

    The state is one plain pytree, replicated over the devices, and donated; a batch has a leading axis of this host's
    devices.

    Args:
        fixed_teacher: as `train_step` takes it.
        static: the keyword arguments of `train_step`.

    Attributes:
        flops: floating-point operations of one device in a step, known after the first call.
    """

    def __init__(self, fixed_teacher: Tree, **static: Any):
        self.flops = 0
        jitted = jax.jit(functools.partial(train_step, **static))

        def count_and_step(state, fixed_teacher, batch):
            self.flops = flops.count(jitted.trace(state, fixed_teacher, batch).jaxpr).total()
            return jitted(state, fixed_teacher, batch)  # reuses the trace above

        self.pmapped = jax.pmap(count_and_step, AXIS, in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=0)
        self.fixed_teacher = fixed_teacher

    def __call__(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        return self.pmapped(state, self.fixed_teacher, batch)
