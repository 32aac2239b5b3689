"""Transforms of samples into arrays: read, decode, crop and tokenize; unreadable samples are masked and named."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from zslflax.data import crops, images
from zslflax.data.batch import Batch
from zslflax.data.images import BadSample
from zslflax.data.sources.base import Annotations, Record, Source
from zslflax.data.streams import AUGMENTATION_STREAM
from zslflax.data.views import Views

MAX_TOKENIZED = 1 << 18  # samples whose tokens are kept in memory; about 120 MB at 32 tokens

Tokens = tuple[np.ndarray, np.ndarray]  # ids int32 [b, t] and mask bool [b, t]


class CaptionTokenizer(Protocol):
    """Turns b captions into ids int32 [b, t] and a mask bool [b, t]; `identity["pad_id"]` is the id of padding."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


class Transform(Protocol):
    """Turns the positions of samples into their arrays. It can be pickled, so that worker processes can use it."""

    def __call__(self, samples: Sequence[Any]) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Reads, augments and tokenizes training samples.

    Attributes:
        sources: what samples are read from.
        tokenizer: of their captions; None where captions are not needed.
        image_size: side of the square images, pixels.
        seed: of the random crops, flips and choices of captions.
        crop_scale: bounds of a crop's share of the image's area.
        flip: whether to mirror half of the images.
        with_ids: whether batches have the ids of images and captions.
        classes: number of classes, of which each image must have one; 0 where labels are not needed.
        weak_view: of a second input of each image, without augmentation; None for one input.
    """

    sources: tuple[Source, ...]
    tokenizer: CaptionTokenizer | None
    image_size: int
    seed: int
    crop_scale: tuple[float, float]
    flip: bool
    with_ids: bool = False
    classes: int = 0
    weak_view: Views | None = None

    def __call__(self, samples: Sequence[tuple[int, int, int]]) -> Batch:
        """Loads samples, each given as (position in the global order, source, index in the source).

        Returns:
            `image`, `text`, `text_mask`, `valid` and `errors`; `image_id` and `text_id` if there are ids; without a
            tokenizer `label`, `source` and `index` instead of the text and the ids, and `weak_image` if there is a
            weak view.
        """
        image, valid = allocate_images(len(samples), self.image_size)
        weak_image, _ = allocate_images(len(samples), self.weak_view.size if self.weak_view else 0)
        image_id, labels = np.zeros((len(samples), 2), np.uint32), np.full(len(samples), -1, np.int32)
        captions, errors = [""] * len(samples), []
        # The weak view is that of evaluation, of which no pixel may change.
        min_side = 0 if self.weak_view else crops.min_side_for_crops(self.image_size, self.crop_scale)
        for i, (position, source, index) in enumerate(samples):
            rng = np.random.default_rng([AUGMENTATION_STREAM, self.seed, position])
            name = default_name(self.sources[source], index)
            try:
                record = self.sources[source][index]
                name = record["name"]
                if self.tokenizer is not None:
                    captions[i] = choose_caption(record, rng)
                elif self.classes:
                    labels[i] = only_label(record, self.classes)
                pixels, flip = record_image(record, min_side), 0.5 * self.flip
                crops.random_resized_crop(pixels, self.image_size, rng, self.crop_scale, flip=flip, out=image[i])
                if self.weak_view is not None:
                    weak_image[i] = self.weak_view(pixels, index, 0)
                valid[i] = True
                if self.with_ids:
                    image_id[i] = content_id(record["image"])
            except BadSample as error:
                errors.append((error.name or name, str(error)))
        image[~valid] = weak_image[~valid] = 0
        if self.tokenizer is None:
            _, source_of, index_of = np.array(samples, np.int64).T
            batch = Batch(image=image, label=labels, valid=valid, errors=tuple(errors))
            batch |= {"source": source_of, "index": index_of}
            return batch if self.weak_view is None else batch | {"weak_image": weak_image}
        text, text_mask = self.tokenizer(captions)
        text = np.where(valid[:, None], text, self.tokenizer.identity["pad_id"]).astype(np.int32)
        text_mask = text_mask & valid[:, None]
        text_mask[:, 0] = True
        batch = Batch(image=image, text=text, text_mask=text_mask, valid=valid, errors=tuple(errors))
        return batch | {"image_id": image_id, "text_id": text_ids(text)} if self.with_ids else batch


@dataclasses.dataclass(frozen=True)
class CaptionTransform:
    """Reads and tokenizes the captions of training samples, whose images are not read.

    The captions that are drawn are those that `TrainTransform` draws. The tokens of up to `MAX_TOKENIZED` samples are
    kept, so that later visits neither read nor tokenize.

    Attributes:
        sources: what samples are read from.
        tokenizer: of their captions.
        seed: of the choices of captions and views.
        views: of each image.
        with_ids: whether batches have the ids of captions.
        tokenized: by (source, index), the ids and the mask of a sample's captions that are not blank, [captions, t].
    """

    sources: tuple[Source, ...]
    tokenizer: CaptionTokenizer
    seed: int
    views: int
    with_ids: bool = False
    tokenized: dict[tuple[int, int], Tokens] = dataclasses.field(default_factory=dict)

    def __call__(self, samples: Sequence[tuple[int, int, int]]) -> Batch:
        """Loads samples, each given as (position in the global order, source, index in the source).

        Returns:
            `text`, `text_mask`, `valid`, `source`, `index`, `view` and `errors`; `text_id` if there are ids.
        """
        tokens, errors = self.load_tokens(samples)
        text, text_mask = map(np.concatenate, zip(*[self.tokenizer([""])] * len(samples)))
        text[:], text_mask[:] = self.tokenizer.identity["pad_id"], False
        valid, view = np.zeros(len(samples), bool), np.zeros(len(samples), np.int64)
        for i, (position, source, index) in enumerate(samples):
            if (source, index) not in tokens:
                continue
            ids, mask = tokens[source, index]
            caption = 0
            if len(ids) > 1 or self.views > 1:  # otherwise there is no choice, and generators are slow to make
                rng = np.random.default_rng([AUGMENTATION_STREAM, self.seed, position])
                caption, view[i] = int(rng.integers(len(ids))), rng.integers(self.views)
            text[i], text_mask[i], valid[i] = ids[caption], mask[caption], True
        text_mask[:, 0] = True
        _, sources, indices = np.array(samples, np.int64).T
        batch = Batch(
            text=text, text_mask=text_mask, valid=valid, source=sources, index=indices, view=view, errors=tuple(errors)
        )
        return batch | {"text_id": text_ids(text)} if self.with_ids else batch

    def load_tokens(
        self, samples: Sequence[tuple[int, int, int]]
    ) -> tuple[dict[tuple[int, int], Tokens], list[tuple[str, str]]]:
        """The tokens of samples by (source, index), without unreadable samples, and the errors of these."""
        tokens, captions, errors = {}, {}, []
        for _, source, index in samples:
            if (source, index) in self.tokenized:
                tokens[source, index] = self.tokenized[source, index]
                continue
            name = default_name(self.sources[source], index)
            try:
                annotations = self.sources[source].read_annotations(index)
                name = annotations["name"]
                captions[source, index] = nonblank_captions(annotations)
            except BadSample as error:
                errors.append((error.name or name, str(error)))
        if captions:
            ids, mask = self.tokenizer([text for texts in captions.values() for text in texts])
            ends = np.cumsum([len(texts) for texts in captions.values()])
            for sample, end in zip(captions, ends):
                start = end - len(captions[sample])
                tokens[sample] = ids[start:end], mask[start:end]
                if len(self.tokenized) < MAX_TOKENIZED:
                    self.tokenized[sample] = tokens[sample]
        return tokens, errors


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Reads evaluation samples, and crops their images.

    Attributes:
        source: what samples are read from.
        image_size: side of the square images, pixels.
        resize, interpolation: of `crops.resize_center_crop`.
        read_images: whether images are read, besides captions and labels.
    """

    source: Source
    image_size: int
    resize: int
    interpolation: str = "area"
    read_images: bool = True

    def __call__(self, samples: Sequence[int]) -> Batch:
        """Loads samples, each given by its index in the source, or -1 for padding.

        Returns:
            `valid`, `index`, `labels`, `captions` and `errors`; `image` if images are read.
        """
        image, valid = allocate_images(len(samples), self.image_size if self.read_images else 0)
        labels: list[tuple[int, ...]] = [()] * len(samples)
        captions: list[tuple[str, ...]] = [()] * len(samples)
        errors = []
        for i, index in enumerate(samples):
            if index < 0:
                continue
            name = default_name(self.source, index)
            annotations: Annotations
            try:
                if self.read_images:
                    annotations = record = self.source[index]
                    name = record["name"]
                    pixels = record_image(record)
                    image[i] = crops.resize_center_crop(pixels, self.image_size, self.resize, self.interpolation)
                else:
                    annotations = self.source.read_annotations(index)
                valid[i], labels[i], captions[i] = True, tuple(annotations["label"]), tuple(annotations["text"])
            except BadSample as error:
                errors.append((error.name or name, str(error)))
        image[~valid] = 0
        indices = np.asarray(samples, np.int64)
        batch = Batch(valid=valid, index=indices, labels=labels, captions=captions, errors=tuple(errors))
        return batch | {"image": image} if self.read_images else batch


def allocate_images(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised images, uint8 [count, size, size, 3], and which of them are valid: none yet, bool [count]."""
    return np.empty((count, size, size, 3), np.uint8), np.zeros(count, bool)


def default_name(source: Source, index: int) -> str:
    """The name of a sample in messages, where it cannot be read and its own name is not known."""
    return f"{type(source).__name__}:{index}"


def record_image(record: Record, min_side: int = 0) -> np.ndarray:
    """The pixels of a record's image, uint8 [height, width, 3]; decodes it where it is encoded, as `images.decode`."""
    image = record["image"]
    return image if isinstance(image, np.ndarray) else images.decode(image, min_side=min_side)


def content_id(content: bytes | np.ndarray) -> np.ndarray:
    """A 64-bit hash of an image as its source has it, or of other values: uint32 [2]."""
    data = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), "<u4")


def text_ids(text: np.ndarray) -> np.ndarray:
    """The ids of captions, uint32 [b, 2]: equal where the text tower sees the same tokens int32 [b, t]."""
    return np.stack([content_id(row) for row in text])


def only_label(record: Annotations, classes: int) -> int:
    """The class of a record, which has exactly one.

    Raises:
        BadSample: it has none or several, or one that is not below `classes`.
    """
    if len(record["label"]) != 1:
        raise BadSample("it has several labels" if record["label"] else "it has no label")
    if not 0 <= record["label"][0] < classes:
        raise BadSample(f"its label is {record['label'][0]}, expected 0 to {classes - 1}")
    return record["label"][0]


def choose_caption(record: Annotations, rng: np.random.Generator) -> str:
    """A random one of the captions that are not blank.

    Raises:
        BadSample: there is none.
    """
    captions = nonblank_captions(record)
    return captions[rng.integers(len(captions))]


def nonblank_captions(record: Annotations) -> list[str]:
    """The captions that are not blank.

    Raises:
        BadSample: there is none.
    """
    captions = [caption for caption in record["text"] if caption.strip()]
    if not captions:
        raise BadSample("its caption is empty" if record["text"] else "it has no caption")
    return captions
