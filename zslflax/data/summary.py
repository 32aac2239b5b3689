"""Says what a data source holds: how many samples, captions, labels and image sizes, and what is left out."""

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from zslflax import figures
from zslflax.data.cores import choose_threads
from zslflax.data.images import BadSample
from zslflax.data.preprocess import record_image
from zslflax.data.sources.base import Annotations, Source

MAX_CLASSES_SHOWN = 8
MAX_REASONS_SHOWN = 5
MAX_CAPTION_SHOWN = 200  # characters


@dataclasses.dataclass(frozen=True)
class Example:
    """A sample that was read.

    Attributes:
        size: width and height of its image, pixels.
        annotations: its captions and labels.
    """

    size: tuple[int, int]
    annotations: Annotations


def summarise_source(source: Source, samples: int = 1_000) -> dict[str, Any]:
    """What a source holds, as values that JSON can hold.

    Args:
        source: to describe.
        samples: how many are read, evenly spaced; 0 for all.

    Returns:
        `samples` in the source; `left_out` by reason; `classes`, their ids, or None; and of the samples that were
        `read`: `unreadable` by reason; `captions` and `labels` per sample, and `image_size` in pixels, as
        {"min", "mean", "max"} and {"min", "median", "max"}; `longest_caption`.
    """
    indices = spaced_indices(len(source), samples or len(source))
    with ThreadPoolExecutor(choose_threads(0)) as pool:
        results = list(pool.map(lambda index: read_example(source, index), indices))
    examples = [result for result in results if isinstance(result, Example)]
    captions = [caption for example in examples for caption in example.annotations["text"]]
    sizes = sorted((example.size for example in examples), key=lambda size: size[0] * size[1])
    return {
        "samples": len(source),
        "left_out": dict(source.excluded),
        "classes": source.classes,
        "read": len(indices),
        "unreadable": dict(collections.Counter(result for result in results if isinstance(result, str)).most_common()),
        "captions": spread([len(example.annotations["text"]) for example in examples]),
        "labels": spread([len(example.annotations["label"]) for example in examples]),
        "image_size": {"min": sizes[0], "median": sizes[len(sizes) // 2], "max": sizes[-1]} if sizes else {},
        "longest_caption": max(captions, key=len, default=""),
    }


def spaced_indices(total: int, count: int) -> list[int]:
    """At most `count` different indices below `total`, evenly spaced.

    >>> spaced_indices(10, 3)
    [0, 4, 9]
    """
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist() if total else []


def read_example(source: Source, index: int) -> Example | str:
    """Reads and decodes a sample; the reason where it cannot be read."""
    try:
        record = source[index]
        height, width, _ = record_image(record).shape
    except BadSample as error:
        return str(error)
    return Example((width, height), Annotations(text=record["text"], label=record["label"], name=record["name"]))


def spread(counts: Sequence[int]) -> dict[str, float]:
    """The smallest, the mean and the largest of counts; {} where there are none."""
    return {"min": min(counts), "mean": round(statistics.fmean(counts), 2), "max": max(counts)} if counts else {}


def format_summary(summary: dict[str, Any]) -> str:
    """The lines of a table with a summary."""
    captions, labels, sizes = summary["captions"], summary["labels"], summary["image_size"]
    longest = summary["longest_caption"]
    rows = [("samples", f"{summary['samples']:,}")]
    rows += [("left out", f"{count:,} × {reason}") for reason, count in summary["left_out"].items()]
    rows += [("read", f"{summary['read']:,}, evenly spaced")] if summary["read"] < summary["samples"] else []
    rows += [
        ("unreadable", f"{count:,} × {reason}")
        for reason, count in list(summary["unreadable"].items())[:MAX_REASONS_SHOWN]
    ]
    if captions:
        rows.append(("captions", format_spread(captions)))
        rows.append(("labels", format_spread(labels)))
    if longest:
        cut = longest if len(longest) <= MAX_CAPTION_SHOWN else longest[:MAX_CAPTION_SHOWN] + "…"
        rows.append(("longest caption", f"{len(longest.split()):,} words, {len(longest):,} characters: {cut}"))
    if sizes:
        shown = ", ".join(f"{name} {width} × {height}" for name, (width, height) in sizes.items())
        rows.append(("image size", f"{shown} pixels"))
    if summary["classes"] is not None:
        names = ", ".join(summary["classes"][:MAX_CLASSES_SHOWN])
        more = ", …" if len(summary["classes"]) > MAX_CLASSES_SHOWN else ""
        rows.append(("classes", f"{len(summary['classes']):,}: {names}{more}"))
    return "\n".join(f"{name:16} {value}" for name, value in rows)


def format_spread(counts: dict[str, float]) -> str:
    """How many captions or labels a sample has.

    >>> format_spread({"min": 1, "mean": 1.5, "max": 2})
    '1 to 2 per sample, 1.5 on average'
    """
    if counts["max"] == 0:
        return "none"
    if counts["min"] == counts["max"]:
        return f"{counts['max']} per sample"
    return f"{counts['min']} to {counts['max']} per sample, {counts['mean']} on average"


def draw_examples(source: Source, count: int = 10) -> Image.Image | None:
    """Draws evenly spaced samples with their captions and labels; None where none of them can be read."""
    pixels, texts = [], []
    for index in spaced_indices(len(source), count):
        try:
            record = source[index]
            image = record_image(record)
        except BadSample:
            continue
        names = [source.classes[label] if source.classes else str(label) for label in record["label"]]
        lines = [*record["text"], *([f"[{', '.join(names)}]"] if names else [])]
        pixels.append(image)
        texts.append(" · ".join(lines) or "no caption")
    return figures.caption_grid(pixels, texts) if pixels else None
