"""Checks of a config that need no files: names, ranges, and fields that contradict each other."""

import math
import re
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from zslflax.config import is_classifier, profiled_steps
from zslflax.config_names import field_names, get_field
from zslflax.errors import UserError, nearest_names
from zslflax.files import check_local
from zslflax.losses import classification, contrastive
from zslflax.models.build import image_tower

INTERPOLATIONS = ("area", "bilinear", "bicubic")  # see `zslflax.data.crops.resample`
MAX_LOADERS = 1024  # workers, or threads in each: more than any machine has cores; 100,000 take all of its memory
POSITIVE = (
    *("steps", "batch_size", "log_every", "eval.every", "eval.batch_size", "checkpoint.every"),
    *("model.embed_dim", "model.image.size", "model.text.max_tokens", "objective.sinkhorn_iterations"),
    *("optimizer.learning_rate", "optimizer.eps"),
)
NOT_NEGATIVE = (
    *("micro_batch", "optimizer.warmup_steps", "optimizer.max_nonfinite_steps"),
    *("optimizer.weight_decay", "optimizer.clip_norm", "objective.soft_ramp_steps"),
    *("objective.refine_from", "objective.choose_templates"),
    *("model.text.cached_captions", "eval.bootstrap_resamples", "eval.first"),
)
ELEMENTS: dict[str, Any] = {  # of fields that are tuples
    **dict.fromkeys(("data.train", "eval.templates", "model.class_names", "optimizer.no_decay"), str),
    **dict.fromkeys(("data.weights", "data.crop_scale", "model.image.mean", "model.image.std"), (int, float)),
}
BELOW_ONE = (
    "model.image.patch_drop",
    "model.text.dropout",
    "model.projection.dropout",
    "optimizer.momentum",
    "optimizer.b1",
    "optimizer.b2",
)


def validate(config: ConfigDict) -> None:
    """Raises a UserError that names the field and the values that it may have."""
    check_elements(config)
    check_choices(config)
    check_ranges(config)
    check_objective(config)
    if is_classifier(config):
        check_classifier(config)
    else:
        check_text(config)
    check_data(config)
    check_eval(config)
    check_patterns(config)
    check_paths(config)
    profiled_steps(config)


def expect(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(f"config: {message}")


def check_choices(config: ConfigDict) -> None:
    """Fields that take one of a few names."""

    def one_of(field: str, value: str, choices: Collection[str]) -> None:
        expect(
            value in choices,
            f"{field} is {value!r}, expected one of {', '.join(choices)}; nearest: {nearest_names(value, choices)}",
        )

    objectives = contrastive.OBJECTIVES | classification.OBJECTIVES
    one_of("objective.name", config.objective.name, objectives)
    one_of("objective.duplicates", config.objective.duplicates, ("negative", "positive", "ignored"))
    one_of("teacher.kind", config.teacher.kind, ("ema", "checkpoint", "none"))
    one_of("teacher.batch_norm", config.teacher.batch_norm, ("batch", "ema", "student"))
    one_of("eval.interpolation", config.eval.interpolation, INTERPOLATIONS)
    one_of("features.dtype", config.features.dtype, ("float16", "bfloat16", "float32"))
    one_of("optimizer.name", config.optimizer.name, ("sgd", "adamw", "lamb"))
    if config.model.image.name:  # otherwise the files of the pretrained tower describe it
        image_tower(config.model.image.name, None, None, remat=False, pool=config.model.image.pool)
    one_of("compute_dtype", config.compute_dtype, ("bfloat16", "float32"))


def check_elements(config: ConfigDict) -> None:
    """The types in fields that are tuples, which ml_collections does not check."""
    for field, kind in ELEMENTS.items():
        values = get_field(config, field)
        kinds = "text in quotation marks" if kind is str else "numbers"
        expect(all(isinstance(value, kind) for value in values), f"{field} is {tuple(values)}, expected {kinds}")


def check_ranges(config: ConfigDict) -> None:
    """Numbers that are finite, positive, not negative, or shares."""
    for field in field_names(config):
        value = get_field(config, field)
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        expect(finite, f"{field} is {value}, expected finite numbers")
    for field in POSITIVE:
        value = get_field(config, field)
        expect(value > 0, f"{field} is {value}, expected a positive number")
    views = config.features.views
    expect(views > 0, f"features.views is {views}, expected 1 (the crop of evaluation) or more random crops")
    for field in NOT_NEGATIVE:
        value = get_field(config, field)
        expect(value >= 0, f"{field} is {value}, expected 0 or a positive number")
    for field in BELOW_ONE:
        value = get_field(config, field)
        expect(0 <= value < 1, f"{field} is {value}, expected a number from 0 to below 1")
    for field in ("seed", "features.seed", "data.shapes.seed"):
        value = get_field(config, field)
        expect(0 <= value < 2**32, f"{field} is {value}, expected a number from 0 to 2³² − 1")
    std = config.model.image.std
    expect(all(value > 0 for value in std), f"model.image.std is {tuple(std)}, expected numbers above 0")
    check_schedule(config)


def check_schedule(config: ConfigDict) -> None:
    """The sizes of the training images."""
    schedule, size = config.model.image.schedule, config.model.image.size
    expect(
        all(isinstance(entry, (tuple, list)) and len(entry) == 2 for entry in schedule),
        f"model.image.schedule is {schedule!r}, expected pairs of pixels and a step, such as ((128, 8000),)",
    )
    steps = [0, *(step for _, step in schedule), config.steps]
    expect(
        all(0 < pixels <= size for pixels, _ in schedule) and steps == sorted(set(steps)),
        f"model.image.schedule is {schedule!r}, expected pixels of at most model.image.size, {size}, and ascending "
        f"steps before the last, {config.steps}",
    )


def check_objective(config: ConfigDict) -> None:
    """The objective and its teacher."""
    objective, teacher = config.objective, config.teacher
    expect(0.0 <= objective.alpha <= 1.0, f"objective.alpha is {objective.alpha}, expected 0 (soft labels) to 1 (hard)")
    expect(0.0 <= objective.smoothing < 1.0, f"objective.smoothing is {objective.smoothing}, expected 0 ≤ ε < 1")
    for field in ("teacher_temperature", "sinkhorn_regulariser", "temperature", "teacher_scale"):
        expect(objective[field] > 0, f"objective.{field} is {objective[field]}, expected a number above 0")
    expect(
        objective.max_similarities >= 0,
        f"objective.max_similarities is {objective.max_similarities}, expected 0 (no chunks) or a positive number",
    )
    expect(0.0 <= teacher.ema_decay < 1.0, f"teacher.ema_decay is {teacher.ema_decay}, expected 0 ≤ decay < 1")
    weight = objective.feature_weight
    expect(weight >= 0, f"objective.feature_weight is {weight}, expected 0 or a positive weight")
    expect(
        weight == 0 or (teacher.kind == "checkpoint" and not is_classifier(config)),
        f"objective.feature_weight is {weight}, which compares the embeddings of two towers with those of a fixed "
        f"teacher, but objective.name is {objective.name} and teacher.kind {teacher.kind}; set teacher.kind to "
        "checkpoint, or objective.feature_weight to 0",
    )
    for field in ("refine_weight", "choose_templates"):
        expect(
            not objective[field] or objective.name == "prompt_distillation",
            f"objective.{field} is {objective[field]}, which only prompt_distillation has, but objective.name is "
            f"{objective.name}; set it to 0",
        )
    expect(
        not objective.refine_weight or objective.refine_from < config.steps,
        f"objective.refine_from is {objective.refine_from}, but the run has {config.steps} steps; lower it, or set "
        "objective.refine_weight to 0",
    )
    needs_teacher = (contrastive.OBJECTIVES | classification.OBJECTIVES)[objective.name].needs_teacher
    expect(
        not (needs_teacher and teacher.kind == "none"),
        f"objective.name {objective.name} learns from a teacher, but teacher.kind is none; set it to ema or checkpoint",
    )
    expect(
        (teacher.kind == "checkpoint") == bool(teacher.workdir),
        f"teacher.kind is {teacher.kind} and teacher.workdir is {teacher.workdir!r}; "
        "a workdir goes with kind checkpoint, and only with it",
    )


def check_classifier(config: ConfigDict) -> None:
    """What a classifier learns from."""
    objective, teacher = config.objective, config.teacher
    kind = classification.OBJECTIVES[objective.name].needs_teacher
    expect(
        not kind or teacher.kind == "checkpoint",
        f"objective.name {objective.name} learns from a fixed teacher; set teacher.kind to checkpoint and "
        "teacher.workdir to its run",
    )
    expect(
        bool(kind) or teacher.kind != "checkpoint",
        f"teacher.kind is checkpoint, but objective.name {objective.name} learns from labels; set it to none or ema",
    )
    for field in ("rotation_weight", "fairness_weight"):
        expect(objective[field] >= 0, f"objective.{field} is {objective[field]}, expected 0 or a positive weight")
    for field in ("min_confidence", "reasons_share", "refine_weight"):
        expect(0 <= objective[field] <= 1, f"objective.{field} is {objective[field]}, expected a share, from 0 to 1")
    expect(
        kind != "prompts" or bool(config.features.folder),
        "features.folder is empty; prompt_distillation keeps the teacher's features of the training images there",
    )


def check_text(config: ConfigDict) -> None:
    """The text tower, and its captions."""
    text = config.model.text
    expect(
        bool(text.pretrained or text.tokenizer),
        "model.text.pretrained and model.text.tokenizer are both empty; a text tower with random weights needs a "
        "tokenizer too",
    )
    expect(
        text.pack_length == 0 or text.pack_length >= text.max_tokens,
        f"model.text.pack_length is {text.pack_length}, expected 0 (a row for each caption) or at least "
        f"model.text.max_tokens, {text.max_tokens}",
    )


def check_data(config: ConfigDict) -> None:
    """Training data."""
    data = config.data
    expect(len(data.train) > 0, "data.train is empty, expected at least one source")
    expect(all(data.train), f"data.train is {tuple(data.train)}, expected no empty names of sources")
    expect(
        len(data.weights) in (0, len(data.train)),
        f"data.weights has {len(data.weights)} values for the {len(data.train)} sources of data.train",
    )
    expect(
        all(weight > 0 for weight in data.weights),
        f"data.weights are {tuple(data.weights)}, expected each to be above 0",
    )
    expect(len(data.crop_scale) == 2, f"data.crop_scale is {data.crop_scale}, expected two shares of the area")
    low, high = data.crop_scale
    expect(0 < low <= high <= 1, f"data.crop_scale is {(low, high)}, expected 0 < smallest ≤ largest ≤ 1, of the area")
    expect(
        -1 <= data.workers <= MAX_LOADERS,
        f"data.workers is {data.workers}, expected a number up to {MAX_LOADERS}, 0 (automatic) or -1 (none)",
    )
    expect(
        0 <= data.threads <= MAX_LOADERS,
        f"data.threads is {data.threads}, expected a number up to {MAX_LOADERS}, or 0 (automatic)",
    )
    expect(
        data.request_timeout > 0 and data.read_timeout > 0,
        f"data.request_timeout is {data.request_timeout} and data.read_timeout {data.read_timeout}, expected seconds "
        "above 0",
    )
    expect(
        0 <= data.max_bad_fraction <= 1,
        f"data.max_bad_fraction is {data.max_bad_fraction}, expected a share, from 0 to 1",
    )


def check_eval(config: ConfigDict) -> None:
    """Evaluation."""
    evaluation = config.eval
    expect(
        evaluation.resize_factor == 0 or evaluation.resize_factor >= 1,
        f"eval.resize_factor is {evaluation.resize_factor}, expected at least 1, or the crop is larger than the image; "
        "or 0 for no crop",
    )
    sets = [name for name, test_set in evaluation.sets.items() if test_set.data]
    expect(
        not evaluation.best_metric or evaluation.best_metric.split("/")[1:2] in [[name] for name in sets],
        f"eval.best_metric is {evaluation.best_metric!r}, expected eval/SET/METRIC with a SET of eval.sets that has "
        f"data: {', '.join(sets) or 'there is none'}",
    )


def check_patterns(config: ConfigDict) -> None:
    """Pairs of a pattern and a number; and that no tower stays at random weights for the whole run."""
    for field in ("freeze", "optimizer.lr_multipliers"):
        entries = get_field(config, field)
        expect(
            all(map(is_pattern_and_number, entries)),
            f"{field} is {entries!r}, expected pairs of a pattern and a number, such as (('text/tower', -1),)",
        )
        for pattern, _ in entries:
            compile_pattern(field, pattern)
    expect(
        all(until >= -1 for _, until in config.freeze),
        f"freeze is {config.freeze!r}, expected steps, or -1 for the whole run",
    )
    for modality in ("image",) if is_classifier(config) else ("image", "text"):
        for pattern, until in config.freeze:
            frozen = until < 0 and compile_pattern("freeze", pattern).match(f"{modality}/tower/")
            expect(
                not frozen or bool(config.model[modality].pretrained or config.init_from),
                f"freeze has {pattern!r} for the whole run, but model.{modality}.pretrained is empty: the tower would "
                f"keep its random weights; nearest that works: give model.{modality}.pretrained, or remove the "
                "pattern from freeze",
            )


def check_paths(config: ConfigDict) -> None:
    """Fields that name local files or folders, none of which may be an address such as gs://bucket/folder."""
    fields = [
        *("model.image.pretrained", "model.text.pretrained", "model.text.tokenizer", "teacher.workdir"),
        *("compilation_cache", "features.folder", "data.exclude", "data.tfds_dir", "data.shapes.root"),
        *("eval.class_cache", "init_from", "objective.sentences"),
    ]
    for name in config.eval.sets:
        fields += [f"eval.sets.{name}.{field}" for field in ("class_names", "unseen", "synonyms", "wordnet")]
    for field in fields:
        check_local(get_field(config, field), f"config: {field}")
    for name, test_set in config.eval.sets.items():
        for path in test_set.classes.split(","):
            check_local(path, f"config: eval.sets.{name}.classes")


def is_pattern_and_number(entry: Any) -> bool:
    """Whether an entry of `freeze` or `optimizer.lr_multipliers` has the right form."""
    pair = isinstance(entry, (tuple, list)) and len(entry) == 2
    return pair and isinstance(entry[0], str) and isinstance(entry[1], (int, float))


def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    """A regular expression of a config field.

    Raises:
        UserError: it is not valid; the message names the field.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"config: {field}: {pattern!r} is not a regular expression: {error}") from None


def check_devices(config: ConfigDict, devices: int) -> None:
    """Raises a UserError where batches cannot be divided evenly over all devices, or a share into micro-batches."""
    for field, size in (("batch_size", config.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if size % devices:
            raise UserError(
                f"config: {field} is {size}, which {devices} devices cannot share evenly; "
                f"nearest that works: {max(devices, size // devices * devices)}"
            )
    share = config.batch_size // devices
    if config.micro_batch and share % config.micro_batch:
        divisors = (size for size in range(1, share + 1) if share % size == 0)
        raise UserError(
            f"config: micro_batch is {config.micro_batch}, which does not divide the {share} pairs of a device; "
            f"nearest that works: {min(divisors, key=lambda size: abs(size - config.micro_batch))}"
        )
