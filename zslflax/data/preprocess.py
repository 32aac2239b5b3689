"""What becomes of single samples: read, decoded, cropped, captioned; bad ones masked and named."""

import dataclasses

import numpy as np

from zslflax.data import images
from zslflax.data.images import BadSample

ORDER_STREAM, AUGMENTATION_STREAM = 0, 1  # of random numbers


@dataclasses.dataclass(frozen=True)
class TrainPreparation:
    """Reads, decodes, augments and tokenises training rows."""

    sources: tuple
    tokenizer: object
    image_size: int
    seed: int
    crop_scale: tuple[float, float]
    flip: bool

    def __call__(self, rows: list[tuple[int, int, int]]) -> dict:
        image, mask = empty(len(rows), self.image_size)
        captions, errors = [""] * len(rows), []
        for i, (position, source, index) in enumerate(rows):
            rng = np.random.default_rng([AUGMENTATION_STREAM, self.seed, position])
            name = f"{type(self.sources[source]).__name__}:{index}"
            try:
                record = self.sources[source][index]
                name = record["name"]
                captions[i] = draw_caption(record, rng)
                image[i] = self.augment(record, rng)
                mask[i] = True
            except BadSample as error:
                errors.append((getattr(error, "name", name), str(error)))
        image[~mask] = 0
        text, text_mask = self.tokenizer(captions)
        text = np.where(mask[:, None], text, self.tokenizer.identity["pad_id"]).astype(np.int32)
        text_mask = text_mask & mask[:, None]
        text_mask[:, 0] = True
        return {"image": image, "text": text, "text_mask": text_mask, "valid": mask, "errors": tuple(errors)}

    def augment(self, record: dict, rng: np.random.Generator) -> np.ndarray:
        image = images.random_resized_crop(pixels(record), self.image_size, rng, scale=self.crop_scale)
        return images.flip(image) if self.flip and rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class EvalPreparation:
    """Reads, decodes and crops evaluation rows."""

    source: object
    image_size: int
    resize: int

    def __call__(self, rows: list[int]) -> dict:
        image, mask = empty(len(rows), self.image_size)
        label, text, errors = [()] * len(rows), [()] * len(rows), []
        for i, index in enumerate(rows):
            if index < 0:
                continue
            name = f"{type(self.source).__name__}:{index}"
            try:
                record = self.source[index]
                name = record["name"]
                image[i] = images.resize_center_crop(pixels(record), self.image_size, self.resize)
                mask[i], label[i], text[i] = True, tuple(record["label"]), tuple(record["text"])
            except BadSample as error:
                errors.append((getattr(error, "name", name), str(error)))
        image[~mask] = 0
        arrays = {"image": image, "valid": mask, "index": np.asarray(rows, np.int64)}
        return {**arrays, "label": label, "text": text, "errors": tuple(errors)}


def empty(rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and mask before anything was read; what stays unread in the former is anything."""
    return np.empty((rows, size, size, 3), np.uint8), np.zeros(rows, bool)


def pixels(record: dict) -> np.ndarray:
    """The record's image, uint8 [height, width, 3]."""
    return record["image"] if isinstance(record["image"], np.ndarray) else images.decode(record["image"])


def draw_caption(record: dict, rng: np.random.Generator) -> str:
    """One of the captions that are not blank."""
    captions = [caption for caption in record["text"] if caption.strip()]
    if not captions:
        raise BadSample("its caption is empty" if record["text"] else "it has no caption")
    return captions[rng.integers(len(captions))]
