"""The optimiser, put together from optax: schedule, parameter groups by patterns, and freezing."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from zslflax.config_checks import compile_pattern
from zslflax.errors import UserError, nearest_names
from zslflax.models.partition import MODALITIES, Tree, partition

FOREVER = -1


def parameter_paths(params: Tree) -> Tree:
    """The same tree with each parameter's path in its place.

    >>> parameter_paths({"image": {"tower": {"kernel": 1, "bias": 2}}})
    {'image': {'tower': {'bias': 'image/tower/bias', 'kernel': 'image/tower/kernel'}}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)


def match_patterns(params: Tree, patterns: tuple[tuple[str, Any], ...], default: Any, field: str) -> Tree:
    """The same tree with the value of the first pattern that matches each parameter's path, or the default.

    Args:
        params: the parameters, or their shapes.
        patterns: pairs of a regular expression, matched from the start of a path, and a value.
        default: the value of parameters that no pattern matches.
        field: the config field that the patterns come from, for errors.

    Raises:
        UserError: a pattern is not a regular expression, or matches no parameter.

    >>> match_patterns({"image": {"a": 1, "b": 2}, "text": {"a": 3}}, (("image/a", 0.5),), 1.0, "lr_multipliers")
    {'image': {'a': 0.5, 'b': 1.0}, 'text': {'a': 1.0}}
    """
    paths = parameter_paths(params)
    all_paths = jax.tree.leaves(paths)
    matched = {pattern: set(filter(compile_pattern(field, pattern).match, all_paths)) for pattern, _ in patterns}
    if unmatched := [pattern for pattern, found in matched.items() if not found]:
        raise UserError(
            f"config: {field}: no parameter matches {', '.join(map(repr, unmatched))}; patterns are matched from the "
            f"start of paths such as {', '.join(all_paths[:: max(1, len(all_paths) // 8)])}; "
            f"nearest: {nearest_path(unmatched[0], all_paths)}"
        )
    return jax.tree.map(
        lambda path: next((value for pattern, value in patterns if path in matched[pattern]), default), paths
    )


def nearest_path(pattern: str, paths: list[str]) -> str:
    """The path, or the beginning of one up to a slash, that is most similar to a pattern."""
    beginnings = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 2)}
    return nearest_names(pattern, sorted(beginnings))


def frozen_towers(params: Tree, freeze: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The modalities whose tower is frozen forever in all of its parameters.

    >>> params = {m: {"tower": {"kernel": 1}, "projection": {"kernel": 2}} for m in ("image", "text")}
    >>> frozen_towers(params, (("text/tower", -1), ("image/tower", 1_000)))
    ('text',)
    """
    return tuple(modality for modality, step in frozen_until(params, freeze).items() if step == FOREVER)


def frozen_until(params: Tree, freeze: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """By modality, the step until which all parameters of its tower are frozen: 0 for none, or `FOREVER`.

    >>> params = {m: {"tower": {"kernel": 1}, "projection": {"kernel": 2}} for m in ("image", "text")}
    >>> frozen_until(params, (("text/tower", -1), ("image/tower", 1_000)))
    {'image': 1000, 'text': -1}
    """
    until = match_patterns(params, freeze, 0, "freeze")
    towers = {modality: set(jax.tree.leaves(until[modality]["tower"])) for modality in MODALITIES if modality in until}
    return {modality: min(steps - {FOREVER}, default=FOREVER) for modality, steps in towers.items()}


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate at each step: linear warm-up from 0, then a cosine to 0 at the last step, or drops.

    In a trial run that is short, the warm-up is cut to half of the run.

    Args:
        config: the `optimizer` section of the config.
        steps: length of the run.

    >>> rate = schedule(ConfigDict({"learning_rate": 2.0, "warmup_steps": 10, "drops": ()}), steps=110)
    >>> [round(float(rate(step)), 6) for step in (0, 5, 10, 60, 110)]
    [0.0, 1.0, 2.0, 1.0, 0.0]
    >>> rate = schedule(ConfigDict({"learning_rate": 2.0, "warmup_steps": 10, "drops": ((0.5, 0.1),)}), steps=110)
    >>> [round(float(rate(step)), 6) for step in (5, 10, 54, 55, 110)]
    [1.0, 2.0, 2.0, 0.2, 0.2]
    """
    warmup_steps = warmup_length(config, steps)
    warmup = optax.linear_schedule(0.0, config.learning_rate, warmup_steps)
    if config.drops:
        factors = {round(share * steps) - warmup_steps: factor for share, factor in config.drops}
        constant = optax.piecewise_constant_schedule(config.learning_rate, factors)
        return optax.join_schedules([warmup, constant], [warmup_steps])
    cosine = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup_steps))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def warmup_length(config: ConfigDict, steps: int) -> int:
    """The steps of the warm-up: `config.warmup_steps`, or half of the run where that is shorter.

    >>> warmup_length(ConfigDict({"warmup_steps": 50}), steps=20)
    10
    """
    return min(config.warmup_steps, steps // 2)


def build_optimizer(config: ConfigDict, params: Tree, steps: int) -> optax.GradientTransformation:
    """The whole update: freeze, clip, precondition and decay, then scale each group by its learning rate.

    It applies to the trained part of `partition(params, frozen_towers(params, config.freeze))`. A parameter that is
    frozen until step k has no optimiser statistics before k. Weight decay follows the usual forms: added to the
    gradient for SGD (as in PyTorch), decoupled for AdamW and LAMB.

    Args:
        config: the whole config.
        params: all parameters, or their shapes.
        steps: length of the run.

    Raises:
        UserError: a pattern is not a regular expression, or matches no parameter.
    """
    o = config.optimizer
    frozen = frozen_towers(params, config.freeze)

    def match_trained(patterns: tuple[tuple[str, Any], ...], default: Any, field: str) -> Tree:
        return partition(match_patterns(params, tuple(patterns), default, field), frozen)[0]

    until = match_trained(config.freeze, 0, "freeze")
    multipliers = match_trained(o.lr_multipliers, 1.0, "optimizer.lr_multipliers")
    decayed = match_trained(tuple((pattern, False) for pattern in o.no_decay), True, "optimizer.no_decay")

    unfrozen = partial(apply_unfrozen, until)
    decay = optax.add_decayed_weights(o.weight_decay, mask=decayed)
    adam = unfrozen(optax.scale_by_adam(o.b1, o.b2, o.eps))
    direction = {
        "sgd": lambda: optax.chain(decay, unfrozen(optax.trace(o.momentum))),
        "adamw": lambda: optax.chain(adam, decay),
        "lamb": lambda: optax.chain(adam, decay, optax.scale_by_trust_ratio()),
    }[o.name]()
    multiply = lambda updates, _: jax.tree.map(lambda u, factor: u * jnp.float32(factor), updates, multipliers)
    return optax.chain(
        unfrozen(optax.identity()),
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        direction,
        optax.stateless(multiply),
        optax.scale_by_learning_rate(schedule(o, steps)),
        unfrozen(optax.identity()),
    )


def apply_unfrozen(until: Tree, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for parameters once they are trained; zero updates, which `inner` never sees, while they are frozen.

    Args:
        until: the step from which each parameter is trained; 0 for always, `FOREVER` for never.
        inner: the transformation.
    """
    transforms = {
        step: optax.set_to_zero() if step == FOREVER else optax.conditionally_mask(inner, partial(operator.le, step))
        for step in set(jax.tree.leaves(until)) - {0}
    }
    return optax.partition({0: inner, **transforms}, until)
