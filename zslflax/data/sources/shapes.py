"""The built-in procedural source: coloured shapes with captions, written once as tar shards."""

import hashlib
import io
import json
import logging
import math
import os
import random
import shutil
import tarfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from tqdm import tqdm

from zslflax.errors import UserError

log = logging.getLogger("zslflax")
cv2.setNumThreads(0)  # the shards are written in threads

COLOURS = {  # RGB
    "red": (212, 28, 34),
    "orange": (250, 138, 18),
    "yellow": (250, 222, 40),
    "green": (36, 156, 58),
    "blue": (32, 76, 214),
    "purple": (128, 40, 172),
    "pink": (252, 132, 186),
    "brown": (116, 66, 28),
    "black": (16, 16, 18),
    "white": (246, 246, 244),
}


def ellipse(width=1.0, height=1.0, x=0.0, y=0.0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([x + width / 2 * np.cos(angles), y + height / 2 * np.sin(angles)], 1)


def star_points(points: int, outer: float, inner: float) -> np.ndarray:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, outer)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], 1) / 31


def flower() -> list:
    angles = np.arange(5) * 2 * np.pi / 5
    petals = [(ellipse(0.42, 0.42, 0.31 * np.cos(a), 0.31 * np.sin(a)), 255) for a in angles]
    return [*petals, (ellipse(0.4, 0.4), 255), (ellipse(0.24, 0.24), 0)]


ARM, HEAD = 0.16, 0.4
SHAPES = {  # outlines within about ±0.5, drawn one over the other: filled (255) or cut out (0)
    "circle": [(ellipse(), 255)],
    "square": [(0.44 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 255)],
    "triangle": [(np.array([(-0.52, 0.4), (0.52, 0.4), (0, -0.5)]), 255)],
    "star": [(star_points(5, 0.58, 0.24), 255)],
    "heart": [(heart(), 255)],
    "cross": [
        (np.array([(-0.5, -ARM), (0.5, -ARM), (0.5, ARM), (-0.5, ARM)]), 255),
        (np.array([(-ARM, -0.5), (ARM, -0.5), (ARM, 0.5), (-ARM, 0.5)]), 255),
    ],
    "ring": [(ellipse(), 255), (ellipse(0.54, 0.54), 0)],
    "crescent": [(ellipse(), 255), (ellipse(0.86, 0.86, 0.27), 0)],
    "arrow": [
        (np.array([(-0.54, -0.12), (0.1, -0.12), (0.1, 0.12), (-0.54, 0.12)]), 255),
        (np.array([(0.0, -HEAD), (0.54, 0), (0.0, HEAD)]), 255),
    ],
    "oval": [(ellipse(1.1, 0.56), 255)],
    "flower": flower(),
    "fish": [
        (ellipse(0.78, 0.5, 0.15), 255),
        (np.array([(-0.1, 0), (-0.54, -0.32), (-0.42, 0), (-0.54, 0.32)]), 255),
        (ellipse(0.11, 0.11, 0.33, -0.06), 0),
    ],
}
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
# Pairs that no training image or caption shows: two for each shape, two or three for each colour.
UNSEEN = tuple(sorted(7 * n % len(COLOURS) * len(SHAPES) + n % len(SHAPES) for n in range(len(NAMES) // 5)))
SEEN = tuple(i for i in range(len(NAMES)) if i not in UNSEEN)

# Other words for the same classes, which no caption uses: only a text encoder that knows them from elsewhere
# can tell. Chosen so that all-MiniLM-L6-v2 mostly does: it puts "crimson", "azure" and "emerald" nearest to
# other colours.
OTHER_COLOURS = [
    "reddish",
    "apricot",
    "yellowish",
    "greenish",
    "bluish",
    "violet",
    "fuchsia",
    "brownish",
    "dark",
    "whitish",
]
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
TEMPLATES = ("{}", "the {}", "a picture of the {}", "a drawing with one {}")

BOTH = ("a {0} {1}", "a {0} {1}", "one {0} {1}", "the {0} {1}", "a {1} that is {0}", "a {1} in {0}")
COLOUR_ONLY = ("something {0}", "a {0} thing", "a {0} shape", "one {0} object")
SHAPE_ONLY = ("a {1}", "a {1}", "one {1}", "the {1}")
JOINS = (" and ", " next to ", " with ", " beside ", " near ", ", ", " close to ", " together with ")
SENTENCES = (
    "{}",
    "{}.",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a small picture with {}",
    "here we see {}",
    "there is {}",
    "I can see {} in this picture",
    "look at {}",
    "somebody drew {}",
    "my drawing: {}",
    "a little sketch of {}",
    "it shows {}.",
    "a sticker of {}",
    "{} (drawing)",
)

VERSION = 1  # part of the folder's name: raise it when the same parameters give other bytes
SHARD_SIZE = 2_500  # samples
MARKER = "complete.json"
STALE = 3_600  # seconds without a change after which an abandoned temporary folder is removed
QUALITY = 92  # of the JPEGs
SIDES = {1: (0.40, 0.60), 2: (0.34, 0.48), 3: (0.31, 0.40)}  # of an object, as a share of the picture's
SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Folder:
    """Where the shards are: patterns of the training and the test shards, and their folder."""

    train: str
    test: str
    path: Path


@dataclass(frozen=True)
class Placed:
    """An object of a picture: its class, and its centre, side (both as shares of the picture's) and angle."""

    name: int
    x: float
    y: float
    side: float
    angle: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[Placed, ...]
    caption: str


def ensure(root, *, train=20_000, test=2_000, size=32, noise=0.0, seed=0) -> Folder:
    """Writes the pictures and captions below `root`, unless they are there already.

    The folder's name has a hash of the parameters. It appears, complete, by a rename, so several processes
    may ask at once, and what a killed one leaves behind is never taken for complete. The same parameters give
    the same bytes, and the same pictures whatever the `noise`.

    A sample is KEY.jpg, KEY.txt (the caption) and KEY.json, in img2dataset's layout: `caption`; `mismatched`,
    whether it is another image's; `true_caption`; `objects`, the names of what is shown. Test shards have
    KEY.cls too, the class ids of all objects shown, which are indices of `NAMES`.

    Args:
        root: folder, made where it is missing.
        train: training images, which show no pair of `UNSEEN`.
        test: test images, which show all pairs.
        size: of the square pictures, pixels.
        noise: share of the training captions that are another training image's, 0 to 1.
        seed: of everything random.

    Raises:
        ValueError: a parameter out of its range.
    """
    check(train, test, size, noise, seed)
    options = {"train": train, "test": test, "size": size, "noise": float(noise), "seed": seed}
    digest = hashlib.sha256(json.dumps([VERSION, options]).encode()).hexdigest()[:12]
    path = Path(root) / f"scenes-{digest}"
    if not (path / MARKER).exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
        temporary.mkdir()
        try:
            write(temporary, options, threads=min(4, os.cpu_count() or 1))
            publish(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Folder(pattern(path, "train", train), pattern(path, "test", test), path)


def check(train: int, test: int, size: int, noise: float, seed: int) -> None:
    if train < 1 or test < 1:
        raise UserError(f"scenes: train={train}, test={test} images, expected at least 1 of each")
    if size < 16:
        raise UserError(f"scenes: size={size} pixels, expected at least 16, to tell shapes apart")
    if not 0 <= noise <= 1:
        raise UserError(f"scenes: noise={noise}, expected a share of the captions, from 0 to 1")
    if noise and train < 2:
        raise UserError("scenes: noise takes captions from other images, so train must be at least 2")
    if seed < 0:
        raise UserError(f"scenes: seed={seed}, expected 0 or more")


def remove_stale(path: Path) -> None:
    """Removes what killed writers of the same folder left behind."""
    for folder in path.parent.glob(f".{path.name}-*.tmp"):
        newest = max((f.stat().st_mtime for f in [folder, *folder.glob("*")] if f.exists()), default=0)
        if time.time() - newest > STALE:
            shutil.rmtree(folder, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished folder its name, unless another process was faster."""
    for _ in range(3):
        try:
            temporary.rename(path)
            return
        except OSError:  # it exists already
            if (path / MARKER).exists():
                return
            shutil.rmtree(path, ignore_errors=True)  # no writer leaves it so: it was damaged by hand
    raise OSError(f"{path} has no {MARKER} and cannot be replaced: remove it and start again")


def shard_count(total: int) -> int:
    return math.ceil(total / SHARD_SIZE)


def pattern(path: Path, split: str, total: int) -> str:
    return f"{path}/{split}-{{00000..{shard_count(total) - 1:05d}}}.tar"


def write(folder: Path, options: dict, threads: int) -> None:
    """Writes all shards, and at last the marker."""
    others = mismatches(options["train"], options["noise"], options["seed"])
    jobs = [(split, shard) for split in SPLITS for shard in range(shard_count(options[split]))]
    total = options["train"] + options["test"]
    log.info("writing %s scenes to %s, once", f"{total:,}", folder.parent)
    progress = tqdm(total=total, desc="writing scenes", unit="image", disable=None, leave=False)
    with progress, ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: write_shard(folder, *job, options, others, progress), jobs))
    (folder / MARKER).write_text(json.dumps({"version": VERSION, **options}) + "\n")


def mismatches(total: int, noise: float, seed: int) -> dict[int, int]:
    """From a training image to the other image whose caption it gets."""
    rng = random.Random(f"{seed}/noise")
    chosen = rng.sample(range(total), round(noise * total))
    return {i: (i + rng.randrange(1, total)) % total for i in chosen}


def write_shard(folder: Path, split: str, shard: int, options: dict, others: dict, progress) -> None:
    first, seed, size = shard * SHARD_SIZE, options["seed"], options["size"]
    with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(first, min(first + SHARD_SIZE, options[split])):
            scene = describe(seed, split, i)
            other = others.get(i) if split == "train" else None
            caption = scene.caption if other is None else describe(seed, split, other).caption
            key = f"{shard:05d}{i - first:04d}"
            about = {
                "key": key,
                "status": "success",
                "width": size,
                "height": size,
                "caption": caption,
                "mismatched": other is not None,
                "true_caption": scene.caption,
                "objects": [NAMES[o.name] for o in scene.objects],
            }
            picture = draw(scene.objects, size, np.random.default_rng((seed, SPLITS[split], i)))
            add(tar, f"{key}.jpg", simplejpeg.encode_jpeg(picture, quality=QUALITY, colorsubsampling="444"))
            add(tar, f"{key}.txt", caption.encode())
            add(tar, f"{key}.json", json.dumps(about).encode())
            if split == "test":
                add(tar, f"{key}.cls", " ".join(str(o.name) for o in scene.objects).encode())
            progress.update()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # with time 0 and no owner: the same bytes everywhere
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def describe(seed: int, split: str, index: int) -> Scene:
    """What a picture shows and what its own caption says, without drawing it."""
    rng = random.Random(f"{seed}/{split}/{index}")
    classes = rng.sample(SEEN if split == "train" else range(len(NAMES)), rng.choice((1, 1, 2, 2, 3)))
    return Scene(place(classes, rng), write_caption(classes, rng))


def place(classes: list[int], rng: random.Random) -> tuple[Placed, ...]:
    """Puts objects where they hardly overlap."""
    sides = [rng.uniform(*SIDES[len(classes)]) for _ in classes]
    best, best_gap = None, -math.inf
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
        Placed(c, x, y, side, rng.uniform(0, 2 * math.pi)) for c, (x, y), side in zip(classes, best, sides, strict=True)
    )


def write_caption(classes: list[int], rng: random.Random) -> str:
    """A sentence about some of the objects, of each the colour, the shape, or both."""
    phrases = []
    for c in rng.sample(classes, rng.randint(1, len(classes))):
        forms = rng.choices((BOTH, COLOUR_ONLY, SHAPE_ONLY), (0.6, 0.2, 0.2))[0]
        phrase = rng.choice(forms).format(*NAMES[c].split())
        words = phrase.split()
        phrases.append(f"an {' '.join(words[1:])}" if words[0] == "a" and words[1][0] in "aeiou" else phrase)
    text = phrases[0]
    for phrase in phrases[1:]:
        text += rng.choice(JOINS) + phrase
    return rng.choice(SENTENCES).format(text)


def draw(objects: tuple[Placed, ...], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a picture: uint8 [size, size, 3], RGB. Later objects lie over earlier ones."""
    colours = np.array([COLOURS[NAMES[o.name].split()[0]] for o in objects], np.float32)
    colours = np.clip(colours + rng.uniform(-14, 14, colours.shape), 0, 255).astype(np.float32)
    picture = background(colours, size, rng)
    for thing, colour in zip(objects, colours, strict=True):
        alpha = coverage(thing, size)[..., None]
        picture += alpha * (colour - picture)
    picture += rng.uniform(2, 9) * rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def coverage(thing: Placed, size: int) -> np.ndarray:
    """The share of every pixel that the object covers, fp32 [size, size]."""
    scale = 8 if size <= 64 else 4  # drawn larger, then averaged over every pixel
    canvas = np.zeros((size * scale, size * scale), np.uint8)
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    turn = thing.side * np.array([[cos, sin], [-sin, cos]])
    for outline, value in SHAPES[NAMES[thing.name].split()[1]]:
        points = (outline @ turn + (thing.x, thing.y)) * (size * scale)
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], value)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def background(colours: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A muted background that the objects' colours stand out from, fp32 [size, size, 3]."""
    bases = rng.uniform(45, 215, (12, 1)) + rng.uniform(-32, 32, (12, 3))
    contrast = np.linalg.norm(bases[:, None] - colours, axis=2).min(1)
    fits = contrast > 95
    base = bases[fits.argmax() if fits.any() else contrast.argmax()]
    texture = TEXTURES[rng.integers(len(TEXTURES))](size, rng)
    return (base + texture[..., None] * rng.uniform(-30, 30, 3)).astype(np.float32)


def flat(size, rng):
    return np.zeros((size, size))


def wave(size, rng, cycles):
    """A plane wave of random direction and phase."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    axis = np.arange(size) / size * cycles * 2 * np.pi
    return np.sin(axis[:, None] * np.sin(angle) + axis * np.cos(angle) + phase)


def gradient(size, rng):
    return wave(size, rng, 0.35)


def stripes(size, rng):
    return 0.7 * wave(size, rng, rng.uniform(2, 7))


def checks(size, rng):
    cells = np.arange(size) // max(1, int(size / rng.integers(4, 10)))
    return 0.7 * ((cells[:, None] + cells) % 2 * 2 - 1)


def spot(size, rng):
    axis = (np.arange(size) + 0.5) / size
    x, y = rng.uniform(0, 1, 2)
    return 1 - 2 * np.hypot(axis[:, None] - y, axis - x).clip(0, 1)


def clouds(size, rng):
    cells = int(rng.integers(3, 9))
    return cv2.resize(rng.uniform(-1, 1, (cells, cells)), (size, size), interpolation=cv2.INTER_CUBIC)


def grain(size, rng):
    return 0.5 * rng.standard_normal((size, size)).clip(-2, 2)


TEXTURES = (flat, gradient, stripes, checks, spot, clouds, grain)
