"""The input pipeline: from records to batches of fixed shape. Each batch is a function of (seed, step) alone."""

import collections
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NoReturn, cast

import grain
import numpy as np

from zslflax.data.batch import Batch
from zslflax.data.cores import NO_WORKERS, available_cores, choose_threads, choose_workers
from zslflax.data.preprocess import (
    CaptionTokenizer,
    CaptionTransform,
    EvalTransform,
    TrainTransform,
    Transform,
)
from zslflax.data.sources.base import Source
from zslflax.data.streams import ORDER_STREAM
from zslflax.data.views import Views
from zslflax.data.workers import WorkerPool
from zslflax.errors import UserError

log = logging.getLogger("zslflax")

CHUNK = 64  # samples that a thread or worker loads at a time, with one call of the tokenizer
GIVE_UP_AFTER = 1_000  # unreadable samples, if no sample was readable


def train_batches(
    sources: Sequence[Source],
    weights: Sequence[float],
    tokenizer: CaptionTokenizer | None,
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
    views: int = 0,
    with_ids: bool = False,
    local_processes: int = 1,
    classes: int = 0,
    weak_view: Views | None = None,
) -> Generator[Batch]:
    """This host's share of an infinite sequence of training batches, from a step on.

    Batch i consists of the positions [i·n, (i+1)·n) of one global order. In this order each source is shuffled
    anew in each of its epochs, and the sources are mixed by weight. Host h of H loads rows [h·n/H, (h+1)·n/H) of
    each batch. The order, the crop, the flip and the choice among several captions are a function of the seed and
    the position alone: the number of threads, workers and hosts and the first step do not change them.

    Args:
        sources: of records; they must be picklable if there are workers.
        weights: one for each source, which grain rounds to a percent of the smallest; (): the sizes of the sources.
        tokenizer: of captions; None where captions are not needed.
        batch_size: n, over all hosts.
        image_size: s, pixels.
        seed: of everything random.
        start_step: i of the first batch.
        process_index, process_count: h and H.
        crop_scale: bounds of a crop's share of the image's area.
        flip: whether to mirror half of the images left to right.
        threads: that read and decode, in each worker; 0: automatic.
        workers: processes; 0: automatic (`cores.choose_workers`), -1: threads of this process.
        local_processes: processes of the run among which the cores of this process are shared.
        classes: number of classes, of which each image must have one; 0 where labels are not needed.
        weak_view: without a tokenizer, of a second input of each image; None for one input.
        views: of each image, whose features are kept; images are then not read. 0: images are read.
        with_ids: whether the batches have the ids by which equal images and captions are found.

    Yields:
        `image` uint8 [b, s, s, 3], `text` int32 [b, t], `text_mask` bool [b, t], `valid` bool [b] and `errors`, a
        tuple of (name, message). A sample that cannot be read or has no caption is not valid and has an error. Its
        image is zeros and its text is padding; the first token is in `text_mask`, which keeps a mean over tokens
        finite. With `views`, there are `source`, `index` and `view` int64 [b] instead of `image`. With ids, there are
        `text_id` and, beside images, `image_id`, uint32 [b, 2]. Without a tokenizer, there are `label` int32 [b],
        `source` and `index` int64 [b] instead of the text, and `weak_image` uint8 [b, s, s, 3] if there is a weak view.

    Raises:
        UserError: there are fewer samples than a batch has; the hosts cannot share a batch evenly; or, while
            iterating, none of the first `GIVE_UP_AFTER` samples could be read.
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
    if views and tokenizer is not None:
        transform: Transform = CaptionTransform(tuple(sources), tokenizer, seed, views, with_ids)
    else:
        scale = crop_scale[0], crop_scale[1]
        options = with_ids, classes, weak_view
        transform = TrainTransform(tuple(sources), tokenizer, image_size, seed, scale, flip, *options)
    order = TrainOrder(global_order(sizes, weights, seed), batch_size, per_host * process_index)
    steps = range(start_step, sys.maxsize // batch_size)
    cores = available_cores() / local_processes
    workers, threads = choose_workers(NO_WORKERS if views and not workers else workers, threads, cores)
    log.info("data: %s, for %.3g cores (data.workers, data.threads)", describe_loading(workers, threads), cores)
    return load_batches(order, transform, per_host, steps, threads, workers, give_up_after=GIVE_UP_AFTER)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    resize: int,
    interpolation: str = "area",
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
    read_images: bool = True,
) -> Iterator[Batch]:
    """All samples once, in order. Host h of H loads the samples h, h + H, …; all hosts get equally many batches.

    Args:
        source: of records.
        batch_size: b, per host.
        image_size: s, pixels.
        resize, interpolation: of `crops.resize_center_crop`.
        process_index, process_count: h and H.
        threads: that read and decode; 0: automatic.
        read_images: whether the batches have images.

    Yields:
        `image` uint8 [b, s, s, 3], `valid` bool [b] (False: padding or unreadable), `index` int64 [b] (position in
        the source, -1 at padding), `labels` and `captions` (lists of b tuples), and `errors` as
        in `train_batches`.

    Raises:
        UserError: the source is empty; `resize` is below the image's size; or, while iterating, no sample could be
            read, or none of this host's first `GIVE_UP_AFTER`.
    """
    if len(source) == 0:
        raise UserError("the evaluation data has no samples")
    if 0 < resize < image_size:
        raise UserError(f"resize is {resize} pixels, expected at least the image's size, {image_size}")
    transform = EvalTransform(source, image_size, resize, interpolation, read_images)
    order = EvalOrder(len(source), batch_size, process_index, process_count)
    steps = -(-len(source) // (batch_size * process_count))
    threads, give_up_after = choose_threads(threads), min(GIVE_UP_AFTER, len(source))
    return load_batches(order, transform, batch_size, range(steps), threads, workers=0, give_up_after=give_up_after)


def global_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The infinite order of the training samples: element p is (source, index in the source).

    Raises:
        UserError: a source is empty, or there is not one positive weight for each source.
    """
    weights = list(weights) or list(sizes)
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise UserError(f"weights are {weights} for sources of {list(sizes)} samples, expected a positive one for each")
    if min(sizes) == 0:
        raise UserError(f"source {list(sizes).index(0)} of {len(sizes)} has no samples")
    seeds = np.random.SeedSequence([ORDER_STREAM, seed]).generate_state(len(sizes))
    orders = [
        grain.MapDataset.range(size).shuffle(seed=int(s)).repeat().map(functools.partial(with_source, k))
        for k, (size, s) in enumerate(zip(sizes, seeds, strict=True))
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def with_source(source: int, index: int) -> tuple[int, int]:
    """(source, index), as a function that can be pickled."""
    return source, int(index)


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """Which samples this host loads in training: (position, source, index in the source).

    Attributes:
        order: `global_order`.
        batch_size: over all hosts.
        offset: of this host's first row in each batch.
    """

    order: grain.MapDataset
    batch_size: int
    offset: int

    def __call__(self, step: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The samples in rows `start` to `stop` of this host's part of a batch."""
        first = step * self.batch_size + self.offset
        return [(position, *self.order[position]) for position in range(first + start, first + stop)]


@dataclasses.dataclass(frozen=True)
class EvalOrder:
    """Which samples this host loads in evaluation: the index in the source, -1 beyond the end.

    Attributes:
        size: number of samples.
        per_host: batch size of this host.
        process_index, process_count: this host and how many there are.
    """

    size: int
    per_host: int
    process_index: int
    process_count: int

    def __call__(self, step: int, start: int, stop: int) -> list[int]:
        """The samples in rows `start` to `stop` of this host's batch."""
        first = step * self.per_host
        indices = (row * self.process_count + self.process_index for row in range(first + start, first + stop))
        return [index if index < self.size else -1 for index in indices]


def load_batches(
    order: Callable[[int, int, int], Sequence[Any]],
    transform: Transform,
    per_host: int,
    steps: range,
    threads: int,
    workers: int,
    give_up_after: int,
) -> Generator[Batch]:
    """Yields the batches of some steps, loaded ahead by threads, or by worker processes with threads each.

    Batches are loaded in chunks, which bounds memory and latency.

    Raises:
        UserError: the first `give_up_after` samples are all unreadable; says why.
    """
    per_batch = -(-per_host // CHUNK)
    bounds = [part * per_host // per_batch for part in range(per_batch + 1)]

    def samples(chunk: int) -> Sequence[Any]:
        step, part = divmod(chunk, per_batch)
        return order(step, bounds[part], bounds[part + 1])

    numbers = range(steps.start * per_batch, steps.stop * per_batch)
    chunks: Any
    if workers:
        chunks = WorkerPool(transform, map(samples, numbers), workers, threads)
    else:
        dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(lambda chunk: transform(samples(int(chunk))))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + per_batch)
        chunks = iter(dataset.to_iter_dataset(options))
    any_valid = False
    errors: list[tuple[str, str]] = []
    try:
        for _ in steps:
            batch = assemble((next(chunks) for _ in range(per_batch)), per_host)
            any_valid = any_valid or bool(batch["valid"].any())
            if not any_valid:
                errors += batch["errors"]
                if len(errors) >= give_up_after:
                    raise_unreadable(errors)
            yield batch
    finally:
        chunks.close()


def describe_loading(workers: int, threads: int) -> str:
    """How batches are loaded, in words.

    >>> describe_loading(workers=14, threads=1)
    '14 worker processes with 1 thread each'
    """
    if workers:
        return f"{workers} worker processes with {threads} thread{'s' * (threads > 1)} each"
    return f"{threads} threads, no worker processes"


def assemble(chunks: Iterable[Batch], rows: int) -> Batch:
    """One batch of the rows of its chunks, key by key. The arrays of a chunk are read before the next one is taken."""
    whole: dict[str, Any] = {}
    start = 0
    for chunk in chunks:
        values = cast(dict[str, Any], chunk)
        for key, value in values.items():
            if not isinstance(value, np.ndarray):
                whole[key] = whole[key] + value if key in whole else value
                continue
            if key not in whole:
                whole[key] = np.empty((rows, *value.shape[1:]), value.dtype)
            whole[key][start : start + len(value)] = value
        start += len(values["valid"])
    return cast(Batch, whole)


def raise_unreadable(errors: Sequence[tuple[str, str]]) -> NoReturn:
    """Raises a UserError that counts the reasons why samples are unreadable, each with its first sample.

    Args:
        errors: (name, message) of each sample.
    """
    first_name: dict[str, str] = {}
    for name, message in errors:
        first_name.setdefault(message, name)
    counts = collections.Counter(message for _, message in errors).most_common(5)
    reasons = "\n  ".join(f"{count} times: {message} (first: {first_name[message]})" for message, count in counts)
    raise UserError(f"none of the first {len(errors)} samples could be used; the reasons:\n  {reasons}")
