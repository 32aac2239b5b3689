"""Every field that a config has, with its default, unit and source; and the checks made before anything is made."""

import json
import re

import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax.errors import UserError, nearest_names
from zslflax.losses.contrastive import OBJECTIVES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision, of pixels in [0, 1]


def default_config() -> ConfigDict:
    """A config with every field present and locked: an override of anything else is an error."""
    c = ConfigDict()
    c.name = "unnamed"  # the workdir is runs/<name> unless --workdir says otherwise
    c.seed = 0
    c.batch_size = 512  # pairs per step, over all devices and hosts
    # Pairs that a device embeds at a time, a divisor of its share; 0: all. Less memory for one more forward pass, at
    # the whole batch's update, but that batch normalisation is of a micro-batch (GradCache, arXiv 2101.06983).
    c.micro_batch = 0
    c.steps = 10_000  # length of the run; the end of the data ends nothing
    c.compute_dtype = "bfloat16"  # inside the towers: bfloat16 | float32; everything else is float32
    c.compilation_cache = "~/.cache/zslflax/xla"  # "" for none
    c.log_every = 20  # steps between lines of metrics.jsonl
    c.profile_steps = ""  # "100:105" writes a trace of these steps into the workdir, from the first to the last of them

    c.model = ConfigDict()
    c.model.embed_dim = 768  # d, width of the joint space
    c.model.image = ConfigDict()
    c.model.image.name = "resnet50"  # a name of `image_tower` in models/build.py, such as resnet18, vit_b16, efficientnet_lite0
    c.model.image.pretrained = ""  # a folder, package:MODULE/FOLDER or Hub id with safetensors; "" trains from scratch
    c.model.image.size = 224  # pixels, height and width
    c.model.image.mean = IMAGENET_MEAN  # the statistics that the pretrained weights expect
    c.model.image.std = IMAGENET_STD
    c.model.image.remat = False  # keep only the blocks' inputs for the gradient: less memory, a third more computation
    c.model.text = ConfigDict()
    c.model.text.pretrained = ""  # a BERT or RoBERTa, likewise; its config.json gives the sizes
    c.model.text.tokenizer = ""  # likewise; "" is the folder of the pretrained encoder
    c.model.text.max_tokens = 60  # longer captions are truncated; special tokens counted
    c.model.text.pack_length = 0  # tokens in a row that training captions share, at least max_tokens; 0: a row for each
    c.model.text.dropout = 0.1
    c.model.text.remat = False  # likewise
    c.model.text.cached_captions = 0  # captions whose features are computed once, if the text tower is frozen
    # Sizes of a BERT without pretrained weights; the vocabulary must hold the tokenizer's.
    c.model.text.scratch = ConfigDict({"layers": 12, "width": 768, "heads": 12, "vocab_size": 30_522})

    # ((pattern, until step), ...): patterns are regular expressions matched from the start of a parameter's path, such
    # as "image/tower" or "text/tower/layer_[0-5]"; -1 is for ever. A tower frozen for ever runs once, without gradient.
    c.freeze = ()

    c.objective = ConfigDict()
    c.objective.name = "self_distillation"  # info_nce | label_smoothing | self_distillation | otter | sigmoid
    c.objective.log_logit_scale = (
        3.9  # initial log of the learnt logit scales, kept within log 1 … log 100 (OTTER's release)
    )
    c.objective.smoothing = 0.1  # ε of label_smoothing
    c.objective.alpha = 0.5  # weight of the hard term (OTTER's release)
    c.objective.soft_ramp_steps = 0  # the soft term's weight grows to 1 − alpha over so many steps
    # τ of self_distillation's soft labels. 0.01 is OTTER's release, for pretrained towers; from scratch a run collapses
    # there (docs/study.md), and 0.05 to 0.1 work.
    c.objective.teacher_temperature = 0.01
    c.objective.image_image_weight = 0.0  # w_vv of the teacher's similarity; 0: the paper; OTTER's release: 1
    c.objective.text_text_weight = 0.0  # w_tt, likewise
    c.objective.remove_diagonal = False  # no soft label on the pair itself; OTTER: True
    c.objective.sinkhorn_regulariser = 0.15  # λ (OTTER, section 4)
    c.objective.sinkhorn_iterations = 5  # (OTTER, section 4)
    c.objective.logit_bias = -10.0  # sigmoid: initial bias (SigLIP, section 3.2)
    # Similarities that a device holds at a time: a larger matrix is computed in chunks of rows; 0: never in chunks.
    c.objective.max_similarities = 2**22

    c.teacher = ConfigDict()
    c.teacher.kind = "ema"  # ema: the average of the student | checkpoint: another run's model | none
    c.teacher.ema_decay = 0.999  # of the average, warmed up as min(decay, (1 + k) / (10 + k)) over updates k
    # What the EMA teacher's batch normalisation uses in its forward pass: the statistics of the batch, the average of
    # the student's running statistics (ema), or the student's running statistics as they are (student).
    c.teacher.batch_norm = "batch"
    c.teacher.workdir = ""  # checkpoint: the workdir of the other run, which is finished: its newest checkpoint counts

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"  # sgd | adamw | lamb
    c.optimizer.learning_rate = 3e-3  # peak
    c.optimizer.warmup_steps = 0  # linear from 0, then cosine to 0 at the last step
    c.optimizer.momentum = 0.9  # sgd
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.98, 1e-6  # adamw, lamb
    c.optimizer.weight_decay = 0.0  # decoupled for adamw and lamb; added to the gradient for sgd
    c.optimizer.no_decay = (r".*/(bias|scale)$", "objective/")  # patterns of parameters without weight decay
    c.optimizer.lr_multipliers = ()  # ((pattern, factor), ...): of the learning rate; the first match counts
    c.optimizer.clip_norm = 0.0  # of the whole gradient; 0: no clipping
    c.optimizer.max_nonfinite_steps = 0  # not finite: so many in a run are dropped and counted, one more stops it

    c.data = ConfigDict()
    c.data.train = ("shapes",)  # "shapes", tar shards "path/{00000..00331}.tar" (globs too), "tfds:NAME/SPLIT"
    c.data.exclude = ""  # a CSV whose column `name` has the training samples to leave out, as zslflax.noise writes it
    c.data.weights = ()  # of the sources in the mixture; (): by their sizes
    c.data.crop_scale = (0.2, 1.0)  # of the image's area, random-resized-crop
    c.data.flip = True  # left to right, at random
    c.data.threads = 0  # that read and decode, in each worker; 0: one more than cores; remote shards want more
    c.data.workers = 0  # processes; 0: threads of this one
    c.data.max_bad_fraction = 0.05  # stop when more than this share of the samples read so far is unreadable
    c.data.tfds_dir = ""  # "": tfds' own default
    c.data.shapes = ConfigDict()  # the built-in procedural source
    c.data.shapes.root = "~/.cache/zslflax"  # where its shards are written, once
    c.data.shapes.train, c.data.shapes.test = 20_000, 2_000  # images
    c.data.shapes.size = 32  # pixels
    c.data.shapes.noise = 0.0  # share of training captions taken from another image
    c.data.shapes.seed = 0

    c.eval = ConfigDict()
    c.eval.every = 1_000  # steps; the last step is always evaluated
    c.eval.batch_size = 512  # images, over all devices
    c.eval.resize_factor = 1.15  # shorter side to this many times the image size, then a centre crop
    c.eval.templates = ("a photo of a {}.",)  # prompts of which a class embedding is the average; or a file of them
    c.eval.bootstrap_resamples = 1_000  # of the bootstrap that gives --mode=evaluate its 95% intervals; 0 for none
    c.eval.best_metric = ""  # the metric whose best checkpoint is kept, such as "eval/test/hit@1"; "": the newest alone
    c.eval.class_cache = "~/.cache/zslflax/classes"  # of class embeddings that --mode=evaluate and predictions keep, 1 GB at most; "" for none
    c.eval.sets = ConfigDict()
    c.eval.sets.test = eval_set()

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1_000  # steps; the last step is always saved
    return c.lock()


def eval_set(
    data: str = "",
    names: str = "",
    unseen: str = "",
    synonyms: str = "",
    classes: str = "",
    wordnet: str = "",
) -> ConfigDict:
    """One test set, evaluated where `data` is given.

    Images with labels are classified among `names`; images with captions are also retrieved by them.

    Args:
        data: a source, as `data.train` takes them, or labelled images: "folder:FOLDER", "csv:FILE",
            "open_images:FOLDER,LABELS.csv", "ml_images:FOLDER,LIST.txt" (`zslflax.data.sources.labelled`). Labels are
            ids where the source knows ids, or else indices into the names.
        names: a file with one class name a line, or "cat,dog,…"; "" where the source, `classes` or `wordnet`
            brings them.
        unseen: the classes whose figures are reported apart, as names or ids.
        synonyms: other names of the same classes, line by line, evaluated as well.
        classes: ids of all classes to choose among: a file or several with commas, united by id, such as Open
            Images' class-descriptions.csv (`read_classes`); "": those that the source knows.
        wordnet: the folder of WordNet's database, which names WordNet's ids and gives the hierarchy for
            hierarchical precision, such as /usr/share/wordnet; "" for neither.
    """
    return ConfigDict(
        {
            "data": data,
            "names": names,
            "unseen": unseen,
            "synonyms": synonyms,
            "classes": classes,
            "wordnet": wordnet,
        }
    )


def set_objective(c: ConfigDict, name: str) -> None:
    """Selects an objective and what its source prescribes with it: the argument of `--config=FILE:NAME`."""
    c.objective.name = name or "self_distillation"
    if name == "otter":  # OTTER's release: train_OTTER.sh
        c.objective.image_image_weight = c.objective.text_text_weight = 1.0
        c.objective.remove_diagonal = True
    if name == "sigmoid":
        c.objective.log_logit_scale = 2.302585  # a scale of 10 (SigLIP, section 3.2)


def fields(c: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields that hold a value."""
    names = []
    for key, value in c.items():
        names += fields(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return names


def check_overrides(c: ConfigDict, arguments: list[str]) -> None:
    """Refuses `--config.FIELD=VALUE` for a field that does not exist; the error names the nearest that does."""
    known = fields(c)
    for argument in arguments:
        if argument.startswith(("--config.", "-config.")):
            name = argument.partition("config.")[2].partition("=")[0]
            name = name.partition("[")[0]
            if name not in known:
                raise UserError(f"--config.{name}: there is no such field; nearest: {nearest_names(name, known, 3)}")


def validate(c: ConfigDict) -> None:
    """Raises a ValueError that names the field, where values contradict each other or can't be meant."""

    def expect(ok: bool, message: str):
        if not ok:
            raise UserError(f"config: {message}")

    def one_of(field: str, value: str, choices) -> None:
        near = nearest_names(value, choices)
        expect(value in choices, f"{field} is {value!r}, expected one of {', '.join(choices)}; nearest: {near}")

    o = c.objective
    one_of("objective.name", o.name, OBJECTIVES)
    one_of("teacher.kind", c.teacher.kind, ("ema", "checkpoint", "none"))
    one_of("teacher.batch_norm", c.teacher.batch_norm, ("batch", "ema", "student"))
    one_of("optimizer.name", c.optimizer.name, ("sgd", "adamw", "lamb"))
    one_of("compute_dtype", c.compute_dtype, ("bfloat16", "float32"))
    for field in ("steps", "batch_size", "log_every", "eval.every", "eval.batch_size", "checkpoint.every"):
        value = c
        for part in field.split("."):
            value = value[part]
        expect(value > 0, f"{field} is {value}, expected a positive number")
    expect(c.micro_batch >= 0, f"micro_batch is {c.micro_batch}, expected 0 (all at once) or pairs at a time")
    expect(0.0 <= o.alpha <= 1.0, f"objective.alpha is {o.alpha}, expected 0 (soft labels alone) to 1 (hard alone)")
    expect(0.0 <= o.smoothing < 1.0, f"objective.smoothing is {o.smoothing}, expected 0 ≤ ε < 1")
    expect(o.teacher_temperature > 0, f"objective.teacher_temperature is {o.teacher_temperature}, expected > 0")
    expect(o.sinkhorn_regulariser > 0, f"objective.sinkhorn_regulariser is {o.sinkhorn_regulariser}, expected > 0")
    expect(
        o.max_similarities >= 0,
        f"objective.max_similarities is {o.max_similarities}, expected 0 (never in chunks) or a number of similarities",
    )
    expect(0.0 <= c.teacher.ema_decay < 1.0, f"teacher.ema_decay is {c.teacher.ema_decay}, expected 0 ≤ decay < 1")
    expect(
        not (OBJECTIVES[o.name].needs_teacher and c.teacher.kind == "none"),
        f"objective.name {o.name} learns from a teacher, but teacher.kind is none; set it to ema or checkpoint",
    )
    expect(
        (c.teacher.kind == "checkpoint") == bool(c.teacher.workdir),
        f"teacher.kind is {c.teacher.kind} and teacher.workdir is {c.teacher.workdir!r}; "
        "a workdir goes with kind checkpoint, and only with it",
    )
    expect(
        bool(c.model.text.pretrained or c.model.text.tokenizer),
        "model.text.pretrained and model.text.tokenizer are both empty; a tower from scratch still needs a tokenizer",
    )
    expect(
        c.model.text.pack_length == 0 or c.model.text.pack_length >= c.model.text.max_tokens,
        f"model.text.pack_length is {c.model.text.pack_length}, expected 0 (a row for each caption) or at least "
        f"model.text.max_tokens, {c.model.text.max_tokens}",
    )
    expect(
        len(c.data.weights) in (0, len(c.data.train)),
        f"data.weights has {len(c.data.weights)} values for the {len(c.data.train)} sources of data.train",
    )
    expect(len(c.data.train) > 0, "data.train names no source")
    expect(
        all(weight > 0 for weight in c.data.weights),
        f"data.weights are {tuple(c.data.weights)}, expected each to be above 0",
    )
    expect(len(c.data.crop_scale) == 2, f"data.crop_scale is {c.data.crop_scale}, expected two shares of the area")
    low, high = c.data.crop_scale
    expect(0 < low <= high <= 1, f"data.crop_scale is {(low, high)}, expected 0 < smallest ≤ largest ≤ 1, of the area")
    expect(
        0 <= c.data.max_bad_fraction <= 1,
        f"data.max_bad_fraction is {c.data.max_bad_fraction}, expected a share, from 0 to 1",
    )
    expect(
        c.eval.resize_factor >= 1,
        f"eval.resize_factor is {c.eval.resize_factor}, expected at least 1, or the crop is larger than the image",
    )
    filled = [name for name, test in c.eval.sets.items() if test.data]
    expect(
        not c.eval.best_metric or c.eval.best_metric.split("/")[1:2] in [[name] for name in filled],
        f"eval.best_metric is {c.eval.best_metric!r}, expected eval/SET/METRIC with a SET of eval.sets that has data: "
        f"{', '.join(filled) or 'there is none'}",
    )
    profiled_steps(c)
    warmup = c.optimizer.warmup_steps
    expect(
        0 <= warmup < c.steps,
        f"optimizer.warmup_steps is {warmup}, expected 0 to {c.steps - 1}, for steps is {c.steps}",
    )
    bad = c.optimizer.max_nonfinite_steps
    expect(bad >= 0, f"optimizer.max_nonfinite_steps is {bad}, expected 0 (the first one stops the run) or more")
    for field, entries in (("freeze", c.freeze), ("optimizer.lr_multipliers", c.optimizer.lr_multipliers)):
        expect(
            all(map(is_pattern_and_number, entries)),
            f"{field} is {entries!r}, expected pairs of a pattern and a number, such as (('text/tower', -1),)",
        )
    expect(
        all(until >= -1 for _, until in c.freeze), f"freeze is {c.freeze!r}, expected steps, or -1 for ever, not below"
    )
    for modality in ("image", "text"):
        for pattern, until in c.freeze:
            whole = matches(pattern, f"{modality}/tower/") and until < 0
            expect(
                not whole or bool(c.model[modality].pretrained),
                f"freeze has {pattern!r} for ever, but model.{modality}.pretrained is empty: a tower of random weights "
                f"would never learn; nearest that works: give model.{modality}.pretrained, or take the pattern out "
                "of freeze",
            )


def is_pattern_and_number(entry) -> bool:
    pair = isinstance(entry, (tuple, list)) and len(entry) == 2
    return pair and isinstance(entry[0], str) and isinstance(entry[1], (int, float))


def profiled_steps(c: ConfigDict) -> tuple[int, int] | None:
    """The first and the last step of `profile_steps`; None for ""."""
    if not c.profile_steps:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", c.profile_steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= c.steps:
        raise UserError(
            f"config: profile_steps is {c.profile_steps!r}, expected FIRST:LAST, two of the steps 1 to {c.steps} in "
            'order, such as 100:105, or "" for no trace'
        )
    return int(found[1]), int(found[2])


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern of `freeze` holds for all that begins with this path."""
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise UserError(f"config: freeze: {pattern!r} is not a regular expression: {error}") from None


def check_devices(c: ConfigDict, devices: int) -> None:
    """Refuses batch sizes that do not divide evenly over all devices, and those into micro-batches."""
    for field, size in (("batch_size", c.batch_size), ("eval.batch_size", c.eval.batch_size)):
        if size % devices:
            raise UserError(
                f"config: {field} is {size}, which {devices} devices cannot share evenly; "
                f"nearest that works: {max(devices, size // devices * devices)}"
            )
    share = c.batch_size // devices
    if c.micro_batch and share % c.micro_batch:
        divisors = (size for size in range(1, share + 1) if share % size == 0)
        raise UserError(
            f"config: micro_batch is {c.micro_batch}, which does not divide the {share} pairs of a device; "
            f"nearest that works: {min(divisors, key=lambda size: abs(size - c.micro_batch))}"
        )


def compute_dtype(c: ConfigDict) -> jnp.dtype:
    return {"bfloat16": jnp.bfloat16, "float32": jnp.float32}[c.compute_dtype]


def to_json(c: ConfigDict) -> str:
    return json.dumps(c.to_dict(), indent=1, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote; fields that it lacks take their defaults, lists become tuples again."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(v) for key, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    values = tuples(json.loads(text))
    c = default_config()
    with c.unlocked():
        sets = values["eval"].pop("sets", {})
        c.eval.sets = ConfigDict({name: eval_set(**test) for name, test in sets.items()})
        c.update(values)
    return c


def compare(a: ConfigDict, b: ConfigDict) -> list[tuple[str, object, object]]:
    """Fields whose values differ, with both; `None` for a field that one of them lacks."""
    a, b = a.to_dict(), b.to_dict()

    def walk(x, y, prefix):
        if isinstance(x, dict) and isinstance(y, dict):
            for key in sorted({*x, *y}):
                yield from walk(x.get(key), y.get(key), f"{prefix}.{key}" if prefix else key)
        elif x != y:
            yield prefix, x, y

    return list(walk(a, b, ""))
