"""The pipeline: from raw image-caption records to batches of fixed shape, a function of (seed, position)."""

import collections
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from zslflax.data.preprocess import ORDER_STREAM, EvalPreparation, TrainPreparation
from zslflax.errors import UserError

CHUNK = 64  # samples that a thread prepares in one go, with one call of the tokenizer
GIVE_UP_AFTER = 1_000  # samples of which none was readable


def train_batches(
    sources: Sequence,
    weights: Sequence[float],
    tokenizer,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    threads: int = 0,
    workers: int = 0,
) -> Iterator[dict]:
    """This host's rows of an infinite sequence of batches, from a step on.

    Batch i is the positions [i·n, (i+1)·n) of one global order, in which every source is shuffled anew in
    each of its epochs and the sources are mixed by weight; host h of H has the rows [h·n/H, (h+1)·n/H).
    Order, crop, flip and the choice among several captions are a function of the seed and the position alone:
    neither threads, workers, hosts nor where one started change them.

    Args:
        sources: raw records, as `open_source` describes them; picklable where there are workers.
        weights: of the sources, which grain rounds to a percent of the smallest; (): by their sizes.
        tokenizer: list of b captions → (ids int32 [b, t], mask bool [b, t]), with `identity["pad_id"]`.
        batch_size: n, over all hosts.
        image_size: s, pixels.
        seed: of everything random.
        start_step: i of the first batch.
        process_index, process_count: h and H.
        crop_scale: share of the image's area that a random-resized-crop takes, from and to.
        flip: mirrors half of the images left to right.
        threads: that read and decode, in each worker; 0: `own_threads()`.
        workers: processes; 0 is this one alone. They are spawned, so the entry point needs a `__main__`
            guard.

    Yields:
        dicts of `image` uint8 [b, s, s, 3], `text` int32 [b, t], `text_mask` bool [b, t], `mask` bool [b] and
        `errors`, a tuple of (name, message). A sample that cannot be read or has no caption has mask False
        and an error; its image is zeros, its text padding, of which the first token is in the text_mask to
        keep a mean over tokens finite.

    Raises:
        ValueError: fewer samples than a batch, a batch that the hosts cannot share evenly; while iterating:
            none of the first thousand samples could be read.
    """
    sizes = [len(source) for source in sources]
    if sum(sizes) < batch_size:
        raise UserError(
            f"the training data has {sum(sizes)} samples, fewer than one batch of {batch_size}; "
            "lower batch_size or give more shards"
        )
    if batch_size % process_count:
        raise UserError(f"batch_size is {batch_size}, which {process_count} hosts cannot share evenly")
    per_host = batch_size // process_count
    prepare = TrainPreparation(tuple(sources), tokenizer, image_size, seed, tuple(crop_scale), flip)
    rows = TrainRows(global_order(sizes, weights, seed), batch_size, per_host * process_index)
    steps = range(start_step, sys.maxsize // batch_size)
    return stream(rows, prepare, per_host, steps, threads, workers, enough=GIVE_UP_AFTER)


def eval_batches(
    source,
    *,
    batch_size: int,
    image_size: int,
    resize: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
) -> Iterator[dict]:
    """All samples once: host h of H has the samples h, h + H, …, padded to as many batches as every host's.

    Args:
        source: raw records, as `open_source` describes them.
        batch_size: b, per host.
        image_size: s, pixels.
        resize: pixels, the image's shorter side before the centre crop.
        process_index, process_count: h and H.
        threads: that read and decode; 0: `own_threads()`.

    Yields:
        dicts of `image` uint8 [b, s, s, 3], `mask` bool [b] (False: padding or unreadable), `index` int64 [b]
        (the number of the sample, -1 for padding), `label` and `text` (lists of b tuples: true classes,
        captions) and `errors` as `train_batches` has them.

    Raises:
        ValueError: an empty source, a resize below the image's size; while iterating: none of the samples
            could be read, or of this host's first thousand.
    """
    if len(source) == 0:
        raise UserError("the evaluation data has no samples")
    if resize < image_size:
        raise UserError(f"resize is {resize} pixels, expected at least the image's size, {image_size}")
    prepare = EvalPreparation(source, image_size, resize)
    rows = EvalRows(len(source), batch_size, process_index, process_count)
    steps = -(-len(source) // (batch_size * process_count))
    enough = min(GIVE_UP_AFTER, len(source))
    return stream(rows, prepare, batch_size, range(steps), threads, workers=0, enough=enough)


def global_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The infinite order of the training samples: element p is (source, index in the source), numbers.

    Raises:
        ValueError: an empty source, or weights that do not fit the sources.
    """
    weights = list(weights) or list(sizes)
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise UserError(f"weights are {weights} for sources of {list(sizes)} samples, expected a positive one for each")
    if min(sizes) == 0:
        raise UserError(f"source {list(sizes).index(0)} of {len(sizes)} has no samples")
    seeds = np.random.SeedSequence([ORDER_STREAM, seed]).generate_state(len(sizes))
    orders = [
        grain.MapDataset.range(size).shuffle(seed=int(s)).repeat().map(functools.partial(tag, k))
        for k, (size, s) in enumerate(zip(sizes, seeds, strict=True))
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def tag(source: int, index: int) -> tuple[int, int]:
    return source, int(index)


@dataclasses.dataclass(frozen=True)
class TrainRows:
    """What is in the rows of this host's training batches: (position, source, index in the source)."""

    order: grain.MapDataset
    batch_size: int
    first: int

    def __call__(self, step: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        at = step * self.batch_size + self.first
        return [(position, *self.order[position]) for position in range(at + start, at + stop)]


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """What is in the rows of this host's evaluation batches: the number of the sample, -1 beyond the end."""

    size: int
    per_host: int
    process_index: int
    process_count: int

    def __call__(self, step: int, start: int, stop: int) -> list[int]:
        at = step * self.per_host
        numbers = (row * self.process_count + self.process_index for row in range(at + start, at + stop))
        return [number if number < self.size else -1 for number in numbers]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Batches in parts, which bounds memory and latency: element e is part e % parts of batch e // parts."""

    rows: Callable
    prepare: Callable
    per_host: int
    parts: int

    def __call__(self, element: int) -> dict:
        step, part = divmod(int(element), self.parts)
        start, stop = part * self.per_host // self.parts, (part + 1) * self.per_host // self.parts
        return self.prepare(self.rows(step, start, stop))


def stream(rows, prepare, per_host: int, steps: range, threads: int, workers: int, enough: int) -> Iterator[dict]:
    """Batches `steps` of `per_host` rows each, prepared ahead by threads, or by workers with threads each.

    Raises:
        ValueError: there were `enough` samples and none was readable; the reasons and the first names.
    """
    parts, threads = -(-per_host // CHUNK), threads or own_threads()
    chunks = grain.MapDataset.range(steps.start * parts, steps.stop * parts).map(Chunks(rows, prepare, per_host, parts))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + parts)
    chunks = chunks.to_iter_dataset(options)
    if workers:
        # Grain reads its own absl flags for workers, which a notebook or a test has not parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        chunks = chunks.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    iterator, readable, bad = iter(chunks), 0, []
    try:
        for _ in steps:
            batch = join([next(iterator) for _ in range(parts)])
            readable += int(batch["valid"].sum())
            bad += () if readable else batch["errors"]
            if not readable and len(bad) >= enough:
                give_up(bad)
            yield batch
    finally:
        iterator.close()


def own_threads() -> int:
    """One more than cores, for the one that reads; each further one contends for Python's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # as SLURM deals them
    return (cores or 1) + 1


def join(parts: list[dict]) -> dict:
    """Concatenates the parts of a batch, arrays and lists alike."""
    whole = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        array = isinstance(first, np.ndarray)
        whole[key] = np.concatenate(values) if array else type(first)(itertools.chain.from_iterable(values))
    return whole


def give_up(errors: list[tuple[str, str]]) -> None:
    """Ends a run that reads nothing: how often each reason came up, with the sample where it first did."""
    first = {}
    for name, message in errors:
        first.setdefault(message, name)
    counts = collections.Counter(message for _, message in errors).most_common(5)
    reasons = "\n  ".join(f"{count} times: {message} (first: {first[message]})" for message, count in counts)
    raise UserError(f"none of the first {len(errors)} samples could be used; the reasons:\n  {reasons}")
