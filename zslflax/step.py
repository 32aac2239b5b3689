"""The update of one step: what pmap maps over the devices. Read it beside objectives.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zslflax import objectives
from zslflax.objectives import LOG_SCALE_RANGE, SOFT_TARGETS, Embeddings
from zslflax.state import (
    TrainState,
    Tree,
    merge,
    student_variables,
    teacher_variables,
    trainable,
    update_average,
)

AXIS = "data"  # the mapped axis: the global batch is spread over it


def features(model, variables: Tree, batch, modality: str, *, train: bool, rngs=None) -> tuple[jax.Array, Tree]:
    """One tower's output [b, f] for this device's pairs, and the batch statistics after it."""
    method = f"{modality}_features"
    if modality == "image":
        inputs = (batch["image"],)
    elif "text_segment" in batch:
        inputs = batch["text"], batch["text_segment"], batch["text_position"], len(batch["mask"])
        method = "packed_text_features"
    else:
        inputs = batch["text"], batch["text_mask"]
    if not train:
        return model.apply(variables, *inputs, train=False, method=method), variables["batch_stats"]
    outputs, updated = model.apply(variables, *inputs, train=True, method=method, mutable=["batch_stats"], rngs=rngs)
    return outputs, {**variables["batch_stats"], **updated.get("batch_stats", {})}


def embed(model, variables: Tree, batch, shared: dict, *, train: tuple[str, ...], rngs=None) -> tuple[Embeddings, Tree]:
    """Unit embeddings of this device's pairs, and the batch statistics after them.

    Args:
        shared: outputs of frozen towers, by modality; a tower that is in here does not run again.
        train: the modalities whose tower runs in training mode (batch statistics, dropout).
    """
    outputs, batch_stats = dict(shared), variables["batch_stats"]
    for modality in ("image", "text"):
        if modality not in shared:
            stats_before = {**variables, "batch_stats": batch_stats}
            outputs[modality], batch_stats = features(
                model, stats_before, batch, modality, train=modality in train, rngs=rngs
            )
    image = model.apply(variables, outputs["image"], method="project_image")
    text = model.apply(variables, outputs["text"], method="project_text")
    return Embeddings(image, text), batch_stats


def gradients(embed, loss, params: Tree, inputs, key: jax.Array, parts: int) -> tuple[Tree, tuple[Any, Tree]]:
    """The gradient of loss(params["objective"], v) by `params`, where v = embed(params, inputs, key) are embeddings.

    In one part, all activations are kept from the embeddings to their gradient. In several, those of one part at a
    time, as in GradCache (Gao et al. 2021, arXiv 2101.06983): by the chain rule

        d loss / d params = Σ_i (d v_i / d params)ᵀ · d loss / d v_i

    where the i-th part alone is needed for v_i: first all v without activations, then the loss's gradient by them, then
    each part again with its share of it. Both passes draw the same dropout. The sum is made in the parameters' fp32.

    Args:
        embed: (params, inputs, key) → (`Embeddings` [b, d], batch statistics after them).
        loss: (params["objective"], `Embeddings` of all of this device's pairs) → (scalar, anything).
        inputs: a tree of arrays, this device's pairs; `parts` divides each array's length.

    Returns:
        The gradient; and what `loss` returned besides, with the batch statistics: in several parts the mean of theirs.
    """
    if parts == 1:

        def embed_and_lose(params):
            student, batch_stats = embed(params, inputs, key)
            value, explained = loss(params["objective"], student)
            return value, (explained, batch_stats)

        return jax.grad(embed_and_lose, has_aux=True)(params)

    turns = split(inputs, parts), jax.random.split(key, parts)
    student, batch_stats = jax.lax.map(lambda turn: embed(params, *turn), turns)
    (by_objective, by_student), explained = jax.grad(loss, (0, 1), has_aux=True)(params["objective"], join(student))

    def add_part(total, turn):
        turn, by_part = turn
        _, pull, _ = jax.vjp(lambda params: embed(params, *turn), params, has_aux=True)
        return jax.tree.map(jnp.add, total, *pull(by_part)), None

    zero = jax.tree.map(jnp.zeros_like, params) | {"objective": by_objective}
    grads, _ = jax.lax.scan(add_part, zero, (turns, split(by_student, parts)))
    # x̄ = x_0 + mean(x_i − x_0) leaves alone what is the same in all parts: a frozen tower's statistics.
    batch_stats = jax.tree.map(lambda x: x[0] + jnp.mean(x - x[0], axis=0), batch_stats)
    return grads, (explained, batch_stats)


def in_parts(function, inputs, parts: int):
    """function(inputs), of `parts` equal parts of the arrays one after another."""
    return function(inputs) if parts == 1 else join(jax.lax.map(function, split(inputs, parts)))


def split(tree, parts: int):
    """[b, …] → [parts, b / parts, …], of every array."""
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), tree)


def join(tree):
    """Undoes `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def train_step(
    state: TrainState, teacher: Tree, batch: dict[str, jax.Array], *, model, tx, config, frozen, teacher_model=None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one global batch, of which this device holds `b` pairs.

    N devices compute what one device would on the same global batch: the gathered negatives keep their gradient, batch
    normalisation is synchronised, and gradients are summed of losses that are divided by the global number of pairs.

    With `config.micro_batch` the towers run on so many pairs at a time, and the update is still the whole batch's, but
    for what couples pairs inside a tower: batch normalisation uses the statistics of a micro-batch (of all devices'
    i-th together), and its running statistics move once a step, by the mean over the micro-batches. Dropout is drawn
    for each micro-batch by itself.

    Args:
        state: the same on every device.
        teacher: variables of a frozen teacher ({} unless teacher.kind is "checkpoint"), without the frozen towers that
            it shares with the student.
        batch: `image` uint8 [b, s, s, 3], `text` int32 [b, t], `text_mask` bool [b, t], `mask` bool [b]. The text may
            be packed instead, as `data.packing.pack` does it, each micro-batch for itself; of a frozen text tower, its
            output `text_features` fp32 [b, f] may stand in for it.
        model: the `TwoTower`; `teacher_model` that of a frozen teacher.
        tx: from `optimizer.build`.
        config: the whole config.
        frozen: the modalities (a tuple) whose tower is frozen for ever.

    Returns:
        The next state; and scalars, fp32 averaged over the global batch's readable pairs. `truncated` is a number of
        pairs, `bad_steps` and `bad_step` are int32, as in the state.
    """
    mask = batch["mask"].astype(jnp.float32)  # (b,)
    pairs = jnp.maximum(jax.lax.psum(jnp.sum(mask), AXIS), 1.0)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), jax.lax.axis_index(AXIS))
    parts = len(mask) // (config.micro_batch or len(mask))

    student = student_variables(state)
    fix = functools.partial(
        fixed_outputs, state, teacher, model=model, config=config, frozen=frozen, teacher_model=teacher_model
    )
    shared, taught = in_parts(fix, batch, parts)

    def embed_student(params, inputs, key):
        variables = {**student, "params": merge(state.params, params)}
        trained = tuple(modality for modality in ("image", "text") if modality not in frozen)
        return embed(model, variables, *inputs, train=trained, rngs={"dropout": key})

    def local_loss(params, student_emb):
        rows = objectives.pair_losses(
            config.objective, params, student_emb, taught, batch["mask"], step=state.step, axis_name=AXIS
        )
        means = jax.tree.map(lambda row: jnp.sum(mask * row) / pairs, rows)  # this device's part of the global mean
        return means["loss"], means

    params = trainable(state.params, frozen)
    grads, (metrics, batch_stats) = gradients(embed_student, local_loss, params, (batch, shared), key, parts)
    grads, metrics = jax.lax.psum((grads, metrics), AXIS)

    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = keep_scales(optax.apply_updates(params, updates))
    following = state.replace(
        step=state.step + 1,
        params=merge(state.params, params),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if config.teacher.kind == "ema":
        averaged = (state.teacher_params, state.teacher_batch_stats)
        towers = {m: params[m] for m in ("image", "text")}
        teacher_params, teacher_batch_stats = update_average(
            averaged, (towers, batch_stats), config.teacher.decay, following.step
        )
        following = following.replace(teacher_params=teacher_params, teacher_batch_stats=teacher_batch_stats)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    state = keep_finite(state, following, finite, config.optimizer.max_bad_steps)
    if "text_truncated" in batch:
        metrics["truncated"] = jax.lax.psum(jnp.sum(batch["text_truncated"].astype(jnp.float32)), AXIS)
    return state, metrics | learnt_scales(state.params["objective"]) | {
        "grad_norm": grad_norm,
        "pairs": pairs,
        "bad_steps": state.bad_steps,
        "bad_step": state.bad_step,
    }


def fixed_outputs(
    state, teacher: Tree, batch, *, model, config, frozen, teacher_model
) -> tuple[dict, Embeddings | None]:
    """What has no gradient, of these pairs: the outputs of frozen towers, by modality, and the teacher's embeddings."""
    shared = {
        modality: batch[f"{modality}_features"]
        if f"{modality}_features" in batch
        else features(model, student_variables(state), batch, modality, train=False)[0]
        for modality in frozen
    }
    if config.objective.name not in SOFT_TARGETS:
        return shared, None
    return shared, teach(state, teacher, batch, shared, model=model, config=config, teacher_model=teacher_model)


def keep_finite(state: TrainState, following: TrainState, finite: jax.Array, allowed: int) -> TrainState:
    """`following` after a step that was finite; else `state`, one step on, or not even that after `allowed` of them."""
    tolerated = state.bad_steps < allowed
    dropped = state.replace(
        step=jnp.where(tolerated, state.step + 1, state.step),
        bad_steps=jnp.where(tolerated, state.bad_steps + 1, state.bad_steps),
        bad_step=jnp.where(tolerated, state.bad_step, state.step),
    )
    moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, dropped)
    return jax.tree.map(lambda new, old: jnp.where(state.bad_step < 0, new, old), moved, state)


def teach(state: TrainState, teacher: Tree, batch, shared: dict, *, model, config, teacher_model) -> Embeddings:
    """The teacher's embeddings of this device's pairs; a frozen tower's output is shared with the student."""
    if config.teacher.kind == "checkpoint":
        shared = {modality: x for modality, x in shared.items() if "tower" not in teacher["params"][modality]}
        return embed(teacher_model, teacher, batch, shared, train=())[0]
    batch_norm = config.teacher.batch_norm
    train = ("image",) if batch_norm == "batch" and state.teacher_batch_stats else ()
    return embed(model, teacher_variables(state, batch_norm), batch, shared, train=train)[0]


def keep_scales(params: Tree) -> Tree:
    """Puts the learnt log-scales back into their range; a clamp in the forward pass would cut their gradient off."""
    kept = {
        name: jnp.clip(value, *LOG_SCALE_RANGE) if name.endswith("log_scale") else value
        for name, value in params["objective"].items()
    }
    return {**params, "objective": kept}


def learnt_scales(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The logit scales, of their logarithms among the objective's parameters."""
    return {
        name.replace("log_scale", "scale"): jnp.exp(value)
        for name, value in params.items()
        if name.endswith("log_scale")
    }
