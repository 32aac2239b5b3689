"""The built-in procedural source: images of coloured shapes with captions, written once as tar shards."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import shutil
import tarfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from tqdm import tqdm

from zslflax.data.cores import available_cores
from zslflax.data.sources.shapes_captions import write_caption
from zslflax.data.sources.shapes_drawing import CLASS_NAMES, COLOURS, SHAPES, PlacedShape, draw_image
from zslflax.data.workers import WorkerPool
from zslflax.errors import StorageError, UserError
from zslflax.saving import storage_errors, write_json

log = logging.getLogger("zslflax")

# Classes that no training image or caption shows: two for each shape, two or three for each colour.
UNSEEN = tuple(sorted(7 * n % len(COLOURS) * len(SHAPES) + n % len(SHAPES) for n in range(len(CLASS_NAMES) // 5)))
SEEN = tuple(i for i in range(len(CLASS_NAMES)) if i not in UNSEEN)

# Synonyms of the class names, in words that no caption uses: only a text encoder that was pretrained knows them. They
# are chosen so that all-MiniLM-L6-v2 mostly does: it puts "crimson", "azure" and "emerald" nearest to other colours.
OTHER_COLOURS = "reddish apricot yellowish greenish bluish violet fuchsia brownish dark whitish".split()
OTHER_SHAPES = (
    "circular disc",
    "four-sided tile",
    "three-sided pyramid",
    "starburst",
    "cardioid",
    "crosses",
    "bracelet",
    "half-moon",
    "arrowhead",
    "ellipse",
    "blossom",
    "trout",
)
SYNONYMS = [f"{colour} {shape}" for colour in OTHER_COLOURS for shape in OTHER_SHAPES]
TEMPLATES = ("{}", "the {}", "a picture of the {}", "a drawing with one {}")  # prompts for the class names

VERSION = 1  # part of the folder's name: raise it when the same options give other bytes
SHARD_SIZE = 2_500  # samples
DRAWN_AT_ONCE = 100  # samples
WORTH_WORKERS = 5_000  # images; one takes 0.4 ms, a process a second to start
MARKER = "complete.json"  # is written last
STALE = 3_600  # seconds without a change after which an abandoned temporary folder is removed
JPEG_QUALITY = 92
SIDES = {1: (0.40, 0.60), 2: (0.34, 0.48), 3: (0.31, 0.40)}  # bounds of a shape's side, by the number of shapes
SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class ShapesShards:
    """Patterns of the training and of the test shards, and the folder that has them."""

    train: str
    test: str
    path: Path


@dataclass(frozen=True)
class ImageDescription:
    """The shapes on an image, and its own caption."""

    shapes: tuple[PlacedShape, ...]
    caption: str


def ensure_shards(
    root: str | Path, *, train: int = 20_000, test: int = 2_000, size: int = 32, noise: float = 0.0, seed: int = 0
) -> ShapesShards:
    """Writes the images and captions in a folder below `root`, unless they are there.

    The folder's name has a hash of the options. The folder appears complete, by a rename: several processes may call
    this at once, and what a killed process leaves behind is never used. The same options give the same bytes, and the
    same images whatever the `noise`.

    A sample is KEY.jpg, KEY.txt (the caption) and KEY.json, in img2dataset's layout, with the fields `caption`,
    `mismatched` (whether it is another image's caption), `true_caption`, and `objects`, the names of the shapes. Test
    samples also have KEY.cls, the indices of the shapes' classes in `CLASS_NAMES`.

    Args:
        root: a folder, which is created if it is missing.
        train: training images, which show none of the `UNSEEN` classes.
        test: test images, which show all classes.
        size: side of the square images, pixels.
        noise: share of the training captions that are another training image's, 0 to 1.
        seed: of everything random.

    Raises:
        UserError: an option is out of its range.
        StorageError: the folder cannot be written; nothing of it is left behind.
    """
    check_options(train, test, size, noise, seed)
    options = {"train": train, "test": test, "size": size, "noise": float(noise), "seed": seed}
    folder = shards_folder(root, options)
    if not (folder / MARKER).exists():
        with storage_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
            temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}.tmp")
            temporary.mkdir()
            try:
                write_shards(temporary, options, choose_drawing_workers(train + test))
                publish(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return ShapesShards(shard_pattern(folder, "train", train), shard_pattern(folder, "test", test), folder)


def shards_folder(root: str | Path, options: dict[str, Any]) -> Path:
    """The folder below `root` in which the shards with these options are."""
    digest = hashlib.sha256(json.dumps([VERSION, options]).encode()).hexdigest()[:12]
    return Path(root) / f"shapes-{digest}"


def shards_exist(root: str | Path, *, train: int, test: int, size: int, noise: float, seed: int) -> bool:
    """Whether `ensure_shards` would find the shards and write nothing."""
    options = {"train": train, "test": test, "size": size, "noise": float(noise), "seed": seed}
    return (shards_folder(os.path.expanduser(root), options) / MARKER).exists()


def check_options(train: int, test: int, size: int, noise: float, seed: int) -> None:
    """Raises a UserError if an option of `ensure_shards` is out of its range."""
    if train < 1 or test < 1:
        raise UserError(f"shapes: train={train}, test={test} images, expected at least 1 of each")
    if size < 16:
        raise UserError(f"shapes: size={size} pixels, expected at least 16, to tell shapes apart")
    if not 0 <= noise <= 1:
        raise UserError(f"shapes: noise={noise}, expected a share of the captions, from 0 to 1")
    if noise and train < 2:
        raise UserError("shapes: noise takes captions from other images, so train must be at least 2")
    if seed < 0:
        raise UserError(f"shapes: seed={seed}, expected 0 or more")


def choose_drawing_workers(images: int) -> int:
    """How many processes draw: one for each core, at most 4; 0 where they would take longer to start than to draw.

    Threads would wait for each other's hold of Python's lock.
    """
    cores = min(4, int(available_cores()))
    return cores if cores > 1 and images >= WORTH_WORKERS else 0


def remove_stale(folder: Path) -> None:
    """Removes the temporary folders that killed writers of the same folder left behind."""
    for temporary in folder.parent.glob(f".{folder.name}-*.tmp"):
        newest = max((f.stat().st_mtime for f in [temporary, *temporary.glob("*")] if f.exists()), default=0)
        if time.time() - newest > STALE:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Renames a finished folder, unless another process was faster."""
    for _ in range(3):
        try:
            temporary.rename(folder)
            return
        except OSError:  # the folder exists
            if (folder / MARKER).exists():
                return
            shutil.rmtree(folder, ignore_errors=True)  # no writer leaves it without a marker: it was damaged by hand
    raise StorageError(f"{folder} has no {MARKER} and cannot be replaced: remove it and start again")


def shard_count(total: int) -> int:
    return math.ceil(total / SHARD_SIZE)


def shard_pattern(folder: Path, split: str, total: int) -> str:
    """The pattern of a split's shards: FOLDER/SPLIT-{00000..00007}.tar."""
    return f"{folder}/{split}-{{00000..{shard_count(total) - 1:05d}}}.tar"


def write_shards(folder: Path, options: dict[str, Any], workers: int) -> None:
    """Writes all shards, then the marker. Worker processes draw the images; 0: this process does."""
    caption_owners = mismatched_captions(options["train"], options["noise"], options["seed"])
    draw = functools.partial(draw_samples, options, caption_owners, SHARD_SIZE)
    spans = [span for split in SPLITS for span in shard_spans(split, options[split])]
    total = options["train"] + options["test"]
    log.info("writing %s images of shapes to %s, once", f"{total:,}", folder.parent)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(total=total, desc="writing shapes", unit="image", disable=None, leave=False)
        )
        drawn: Iterable[list[tuple[str, bytes]]] = map(draw, spans)
        if workers:
            pool = WorkerPool(draw, iter(spans), workers, threads=1, setting="")
            drawn = stack.enter_context(contextlib.closing(pool))
        shard_of = lambda part: (part[0][0], part[0][1] // SHARD_SIZE)
        for (split, shard), parts in itertools.groupby(zip(spans, drawn, strict=True), shard_of):
            with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for (_, first, end), members in parts:
                    for name, data in members:
                        add_member(tar, name, data)
                    progress.update(end - first)
    write_json(folder / MARKER, {"version": VERSION, **options})


def mismatched_captions(total: int, noise: float, seed: int) -> dict[int, int]:
    """From each training image with a mismatched caption to the image whose caption it gets.

    Args:
        total: training images.
        noise: share of them with mismatched captions.
        seed: of the choice.
    """
    rng = random.Random(f"{seed}/noise")
    chosen = rng.sample(range(total), round(noise * total))
    return {i: (i + rng.randrange(1, total)) % total for i in chosen}


def shard_spans(split: str, total: int) -> Iterator[tuple[str, int, int]]:
    """The samples of a split in parts that lie in one shard: (split, first, end)."""
    for start in range(0, total, SHARD_SIZE):
        stop = min(start + SHARD_SIZE, total)
        yield from ((split, first, min(first + DRAWN_AT_ONCE, stop)) for first in range(start, stop, DRAWN_AT_ONCE))


def draw_samples(
    options: dict[str, Any], caption_owners: dict[int, int], shard_size: int, span: tuple[str, int, int]
) -> list[tuple[str, bytes]]:
    """Draws some samples of a split.

    Args:
        options: of `ensure_shards`.
        caption_owners: `mismatched_captions`.
        shard_size: samples of a shard.
        span: the split, the first sample and the end.

    Returns:
        The members of the shard: (name, contents).
    """
    (split, first, end), seed, size = span, options["seed"], options["size"]
    members: list[tuple[str, bytes]] = []
    for i in range(first, end):
        image = describe_image(seed, split, i)
        owner = caption_owners.get(i) if split == "train" else None
        caption = image.caption if owner is None else describe_image(seed, split, owner).caption
        key = f"{i // shard_size:05d}{i % shard_size:04d}"
        fields = {
            "key": key,
            "status": "success",
            "width": size,
            "height": size,
            "caption": caption,
            "mismatched": owner is not None,
            "true_caption": image.caption,
            "objects": [CLASS_NAMES[shape.label] for shape in image.shapes],
        }
        pixels = draw_image(image.shapes, size, np.random.default_rng((seed, SPLITS[split], i)))
        jpeg = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="444")
        members += [(f"{key}.jpg", jpeg), (f"{key}.txt", caption.encode())]
        members.append((f"{key}.json", json.dumps(fields).encode()))
        if split == "test":
            members.append((f"{key}.cls", " ".join(str(shape.label) for shape in image.shapes).encode()))
    return members


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # with time 0 and no owner: the same bytes everywhere
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def describe_image(seed: int, split: str, index: int) -> ImageDescription:
    """The shapes on an image and its own caption, without drawing it."""
    rng = random.Random(f"{seed}/{split}/{index}")
    labels = rng.sample(SEEN if split == "train" else range(len(CLASS_NAMES)), rng.choice((1, 1, 2, 2, 3)))
    return ImageDescription(place_shapes(labels, rng), write_caption(labels, rng))


def place_shapes(labels: Sequence[int], rng: random.Random) -> tuple[PlacedShape, ...]:
    """Places shapes of the given classes so that they hardly overlap."""
    sides = [rng.uniform(*SIDES[len(labels)]) for _ in labels]
    best: list[tuple[float, float]] = []
    best_gap = -math.inf
    for _ in range(40):
        centres = [(rng.uniform(0.53 * s, 1 - 0.53 * s), rng.uniform(0.53 * s, 1 - 0.53 * s)) for s in sides]
        gap = min(
            (math.dist(centres[i], centres[j]) / (sides[i] + sides[j]) for i in range(len(sides)) for j in range(i)),
            default=1.0,
        )
        if gap > best_gap:
            best, best_gap = centres, gap
        if gap > 0.5:  # circles would not touch
            break
    return tuple(
        PlacedShape(label, x, y, side, rng.uniform(0, 2 * math.pi))
        for label, (x, y), side in zip(labels, best, sides, strict=True)
    )
