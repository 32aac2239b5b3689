"""Schedules, parameter groups and freezing, put together from optax."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zslflax.config_checks import compile_pattern
from zslflax.errors import UserError, nearest_names
from zslflax.models.partition import partition

FOR_EVER = -1


def paths(params: Any) -> Any:
    """The same tree with each parameter's path, such as "image/tower/conv1/kernel", in its place."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)


def match(params: Any, patterns: tuple[tuple[str, Any], ...], default: Any, field: str) -> Any:
    """The same tree with the value of the first pattern that matches each path from its start, or the default.

    Raises:
        ValueError: a pattern is not a regular expression, or no parameter matches it.
    """
    matched = set()

    def value_of(path: str):
        values = []
        for pattern, value in patterns:
            if compile_pattern(field, pattern).match(path):
                matched.add(pattern)
                values.append(value)
        return values[0] if values else default

    named = paths(params)
    tree = jax.tree.map(value_of, named)
    if unmatched := [pattern for pattern, _ in patterns if pattern not in matched]:
        every = jax.tree.leaves(named)
        raise UserError(
            f"config: {field}: no parameter matches {', '.join(map(repr, unmatched))}; patterns are matched from the "
            f"start of paths such as {', '.join(every[:: max(1, len(every) // 8)])}; "
            f"nearest: {nearest(unmatched[0], every)}"
        )
    return tree


def nearest(pattern: str, every: list[str]) -> str:
    """The path, or the beginning of one up to a slash, that is most like a pattern."""
    begun = {"/".join(path.split("/")[:depth]) for path in every for depth in range(1, path.count("/") + 2)}
    return nearest_names(pattern, sorted(begun))


def frozen_towers(params: Any, freeze: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Which of "image" and "text" have a tower all of whose parameters are frozen for ever."""
    until = match(params, freeze, 0, "freeze")
    return tuple(
        modality
        for modality in ("image", "text")
        if all(step == FOR_EVER for step in jax.tree.leaves(until[modality]["tower"]))
    )


def schedule(config, steps: int) -> optax.Schedule:
    """The learning rate at each step: linear warm-up from 0, then a cosine to 0 at the last step."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    cosine = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - config.warmup_steps))
    return optax.join_schedules([warmup, cosine], [config.warmup_steps])


def build_optimizer(config, params: Any, steps: int) -> optax.GradientTransformation:
    """The whole update: freeze, clip, precondition and decay, then scale each group by its learning rate.

    It applies to the trained part of `partition(params, frozen_towers(...))`, while `params` and the patterns are of the whole.
    A parameter that is frozen until step k has no optimiser statistics before k. Weight decay follows the usual forms:
    added to the gradient for SGD (as torch does), decoupled for AdamW and LAMB.
    """
    o = config.optimizer
    frozen = frozen_towers(params, config.freeze)
    until = partition(match(params, tuple(config.freeze), 0, "freeze"), frozen)[0]
    factors = partition(match(params, tuple(o.lr_multipliers), 1.0, "optimizer.lr_multipliers"), frozen)[0]
    no_decay = tuple((pattern, False) for pattern in o.no_decay)
    decayed = partition(match(params, no_decay, True, "optimizer.no_decay"), frozen)[0]

    def unfrozen(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """`inner` for what is free; zero for what is frozen, which `inner` never sees."""
        later = {
            step: optax.set_to_zero()
            if step == FOR_EVER
            else optax.conditionally_mask(inner, partial(operator.le, step))
            for step in set(jax.tree.leaves(until)) - {0}
        }
        return optax.partition({0: inner, **later}, until)

    decay = optax.add_decayed_weights(o.weight_decay, mask=decayed)
    adam = unfrozen(optax.scale_by_adam(o.b1, o.b2, o.eps))
    direction = {
        "sgd": lambda: optax.chain(decay, unfrozen(optax.trace(o.momentum))),
        "adamw": lambda: optax.chain(adam, decay),
        "lamb": lambda: optax.chain(adam, decay, optax.scale_by_trust_ratio()),
    }[o.name]()
    return optax.chain(
        unfrozen(optax.identity()),
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        direction,
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: u * jnp.float32(factor), updates, factors)),
        optax.scale_by_learning_rate(schedule(o, steps)),
        unfrozen(optax.identity()),
    )
