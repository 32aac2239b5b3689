"""Parses the files beside the image of a webdataset sample: captions, labels and JSON."""

import json
from typing import Any

from zslflax.data.images import BadSample


def parse_captions_and_labels(
    text: bytes | None,
    fields: bytes | None,
    label: bytes | None,
    texts: bytes | None = None,
    captions_per_line: bool = False,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The captions and the labels in a sample's text, JSON, label and list of texts.

    >>> parse_captions_and_labels(b"a cat", b'{"caption": "a dog", "label": 3}', None)
    (('a cat',), (3,))
    >>> parse_captions_and_labels(None, b'{"captions": ["a cat", "a pet"]}', None)
    (('a cat', 'a pet'), ())

    Raises:
        BadSample: the JSON or the labels are damaged. Labels in JSON that are not whole numbers are ignored.
    """
    captions: tuple[str, ...] = ()
    if texts is not None:
        captions = parse_texts(texts)
    elif text is not None:
        decoded = text.decode(errors="replace")
        lines = decoded.split("\n") if captions_per_line else [decoded]
        captions = tuple(line.strip() for line in lines if line.strip() or len(lines) == 1)
    labels = () if label is None else parse_labels(label)
    # Most captions come from text files, and most JSON has no labels: parse JSON only if it is needed.
    if fields is not None and (not captions or (label is None and b'"label' in fields)):
        parsed = parse_json(fields)
        captions = captions or captions_in_json(parsed)
        if label is None:
            value = parsed.get("label", parsed.get("labels", ()))
            values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            labels = values if all(type(c) is int for c in values) else ()
    return captions, tuple(dict.fromkeys(labels))


def captions_in_json(fields: dict[str, Any]) -> tuple[str, ...]:
    """The texts in the field `caption` or `captions`, a text or a list of texts; () if there is none."""
    for name in ("caption", "captions"):
        value = fields.get(name)
        values = value if isinstance(value, list) else [value]
        if texts := tuple(text.strip() for text in values if isinstance(text, str)):
            return texts
    return ()


def parse_texts(data: bytes) -> tuple[str, ...]:
    """The texts in a JSON list.

    Raises:
        BadSample: it is not a list of texts.
    """
    texts = load_json(data)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample(f"its list of captions is {type(texts).__name__} {data[:40]!r}, expected a JSON list of texts")
    return tuple(text.strip() for text in texts)


def parse_json(data: bytes) -> dict[str, Any]:
    """The fields of a sample's JSON file.

    Raises:
        BadSample: the file does not hold a JSON object.
    """
    fields = load_json(data)
    if not isinstance(fields, dict):
        raise BadSample(f"its JSON is a {type(fields).__name__}, expected an object")
    return fields


def load_json(data: bytes) -> Any:
    """The value in a sample's JSON file."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
        raise BadSample(f"its JSON is damaged: {error}") from error


def parse_labels(data: bytes) -> tuple[int, ...]:
    """The whole numbers in a sample's label file.

    >>> parse_labels(b"7, 8")
    (7, 8)
    """
    try:
        return tuple(map(int, data.replace(b",", b" ").split()))
    except ValueError:
        raise BadSample(f"its label is {data[:40]!r}, expected whole numbers") from None
