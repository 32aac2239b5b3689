"""What a batch on the host may have in it: the names, types and shapes of its arrays."""

from typing import TypedDict

import numpy as np


class Batch(TypedDict, total=False):
    """A batch of b samples on the host. Which keys it has depends on the function that yields it.

    Attributes:
        image: uint8 [b, s, s, 3].
        weak_image: uint8 [b, s, s, 3], the same images in another view.
        text: int32 [b, t], token ids; or, packed, int32 [rows, width].
        text_mask: bool [b, t], False at padding.
        text_segment, text_position: int32 [rows, width], of packed text (`packing.pack`).
        text_truncated: bool [b], of packed text.
        image_features, text_features: fp32 [b, f], outputs of a frozen tower.
        image_id, text_id: uint32 [b, 2], `content_id` of the image file and of the caption's tokens.
        valid: bool [b], False where the sample is padding or unreadable.
        source: int64 [b], which of the training sources a sample is from.
        index: int64 [b], positions in the source, -1 at padding.
        view: int64 [b], which of the views of an image.
        label: int32 [b], true classes, -1 where there is none.
        labels, captions: in evaluation, b tuples of true classes and of captions.
        teacher_features: fp32 [b, f], outputs of a teacher's image tower.
        has_reasons: bool [b], whether an image has reasons (`losses.classification`).
        errors: (name, message) of each unreadable sample.
    """

    image: np.ndarray
    weak_image: np.ndarray
    text: np.ndarray
    text_mask: np.ndarray
    text_segment: np.ndarray
    text_position: np.ndarray
    text_truncated: np.ndarray
    image_features: np.ndarray
    text_features: np.ndarray
    image_id: np.ndarray
    text_id: np.ndarray
    valid: np.ndarray
    source: np.ndarray
    index: np.ndarray
    view: np.ndarray
    label: np.ndarray
    labels: list[tuple[int, ...]]
    captions: list[tuple[str, ...]]
    teacher_features: np.ndarray
    has_reasons: np.ndarray
    errors: tuple[tuple[str, str], ...]
