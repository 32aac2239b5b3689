"""Draws the images of the built-in source: coloured shapes on muted, textured backgrounds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

cv2.setNumThreads(0)  # several processes draw

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

Outline = tuple[np.ndarray, int]  # points [n, 2] within about ±0.5, filled (255) or cut out (0)


def ellipse(width: float = 1.0, height: float = 1.0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([x + width / 2 * np.cos(angles), y + height / 2 * np.sin(angles)], 1)


def star(points: int, outer: float, inner: float) -> np.ndarray:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, outer)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], 1) / 31


def flower() -> list[Outline]:
    angles = np.arange(5) * 2 * np.pi / 5
    petals = [(ellipse(0.42, 0.42, 0.31 * np.cos(a), 0.31 * np.sin(a)), 255) for a in angles]
    return [*petals, (ellipse(0.4, 0.4), 255), (ellipse(0.24, 0.24), 0)]


ARM, HEAD = 0.16, 0.4
SHAPES: dict[str, list[Outline]] = {  # outlines are drawn one over the other
    "circle": [(ellipse(), 255)],
    "square": [(0.44 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 255)],
    "triangle": [(np.array([(-0.52, 0.4), (0.52, 0.4), (0, -0.5)]), 255)],
    "star": [(star(5, 0.58, 0.24), 255)],
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
CLASS_NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


@dataclass(frozen=True)
class PlacedShape:
    """A coloured shape on an image.

    Attributes:
        label: index of its class in `CLASS_NAMES`.
        x, y: its centre, as a share of the image's side.
        side: its size, as a share of the image's side.
        angle: its rotation, radians.
    """

    label: int
    x: float
    y: float
    side: float
    angle: float

    @property
    def colour(self) -> str:
        return CLASS_NAMES[self.label].split()[0]

    @property
    def shape(self) -> str:
        return CLASS_NAMES[self.label].split()[1]


def draw_image(shapes: Sequence[PlacedShape], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws an image: uint8 [size, size, 3], RGB. Later shapes cover earlier ones."""
    colours = np.array([COLOURS[shape.colour] for shape in shapes], np.float32)
    colours = np.clip(colours + rng.uniform(-14, 14, colours.shape), 0, 255).astype(np.float32)
    image = draw_background(colours, size, rng)
    for shape, colour in zip(shapes, colours, strict=True):
        alpha = coverage(shape, size)[..., None]
        image += alpha * (colour - image)
    image += rng.uniform(2, 9) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def coverage(placed: PlacedShape, size: int) -> np.ndarray:
    """The share of every pixel that a shape covers, fp32 [size, size]."""
    scale = 8 if size <= 64 else 4  # drawn larger, then averaged over every pixel
    canvas = np.zeros((size * scale, size * scale), np.uint8)
    cos, sin = math.cos(placed.angle), math.sin(placed.angle)
    rotation = placed.side * np.array([[cos, sin], [-sin, cos]])
    for outline, value in SHAPES[placed.shape]:
        points = (outline @ rotation + (placed.x, placed.y)) * (size * scale)
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], value)
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def draw_background(colours: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A muted background from which the shapes stand out, fp32 [size, size, 3].

    Args:
        colours: fp32 [n, 3], of the shapes.
        size: side of the image, pixels.
        rng: the source of randomness.
    """
    bases = rng.uniform(45, 215, (12, 1)) + rng.uniform(-32, 32, (12, 3))
    contrast = np.linalg.norm(bases[:, None] - colours, axis=2).min(1)
    sufficient = contrast > 95
    base = bases[sufficient.argmax() if sufficient.any() else contrast.argmax()]
    texture = TEXTURES[rng.integers(len(TEXTURES))](size, rng)
    return (base + texture[..., None] * rng.uniform(-30, 30, 3)).astype(np.float32)


# Textures: (size, rng) → [size, size], about -1 to 1.


def flat(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((size, size))


def wave(size: int, rng: np.random.Generator, cycles: float) -> np.ndarray:
    """A plane wave of random direction and phase."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    axis = np.arange(size) / size * cycles * 2 * np.pi
    return np.sin(axis[:, None] * np.sin(angle) + axis * np.cos(angle) + phase)


def gradient(size: int, rng: np.random.Generator) -> np.ndarray:
    return wave(size, rng, 0.35)


def stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    return 0.7 * wave(size, rng, rng.uniform(2, 7))


def checks(size: int, rng: np.random.Generator) -> np.ndarray:
    cells = np.arange(size) // max(1, int(size / rng.integers(4, 10)))
    return 0.7 * ((cells[:, None] + cells) % 2 * 2 - 1)


def spot(size: int, rng: np.random.Generator) -> np.ndarray:
    axis = (np.arange(size) + 0.5) / size
    x, y = rng.uniform(0, 1, 2)
    return 1 - 2 * np.hypot(axis[:, None] - y, axis - x).clip(0, 1)


def clouds(size: int, rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(3, 9))
    return cv2.resize(rng.uniform(-1, 1, (cells, cells)), (size, size), interpolation=cv2.INTER_CUBIC)


def grain(size: int, rng: np.random.Generator) -> np.ndarray:
    return 0.5 * rng.standard_normal((size, size)).clip(-2, 2)


TEXTURES: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (
    flat,
    gradient,
    stripes,
    checks,
    spot,
    clouds,
    grain,
)
