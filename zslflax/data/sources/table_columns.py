"""Which columns of a table hold images, captions and labels: found by name and type, or named by the user."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zslflax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Names in lower case, in order of preference.
IMAGE_NAMES = (
    *("image", "img", "jpg", "png", "webp", "picture", "photo", "image_path", "img_path", "image_file", "image_name"),
    *("filepath", "file_path", "file_name", "filename", "file", "path", "image_url", "url"),
)
CAPTION_NAMES = (
    *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "raw", "comment", "description"),
    *("alt_text", "prompt"),
)
NUMBERED_CAPTION = re.compile(r"(caption|text|sentence)s?[ _]?\d+")
LABEL_NAMES = ("label", "labels", "class", "fine_label", "category")
KINDS = ("image", "caption", "label")

ChosenColumns = dict[str, list[str]]  # the columns that the user named, by kind
Path = tuple[str, ...]  # of a column in nested structs


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a table that a source reads.

    Attributes:
        image: bytes, a path, an address, or a struct of `bytes` and `path`, as Hugging Face's `Image`.
        captions: paths of texts, or lists of texts.
        label: class ids or indices, one or a list; "" for none.
    """

    image: str
    captions: tuple[Path, ...]
    label: str

    def names(self) -> list[str]:
        """The different columns at the top level."""
        return list(dict.fromkeys([self.image, *(path[0] for path in self.captions), *filter(None, [self.label])]))


def split_columns(spec: str) -> tuple[str, ChosenColumns]:
    """The location and the named columns in "LOCATION#image=COLUMN,caption=COLUMN,caption=COLUMN,label=COLUMN".

    A path that exists stands for itself.

    >>> split_columns("pairs.csv#image=file,caption=en,caption=de")
    ('pairs.csv', {'image': ['file'], 'caption': ['en', 'de']})

    Raises:
        UserError: what follows "#" does not name columns so.
    """
    location, separator, fragment = spec.rpartition("#")
    if not separator or os.path.exists(spec):
        return spec, {}
    chosen: ChosenColumns = {}
    for part in fragment.split(","):
        kind, _, column = part.partition("=")
        if kind not in KINDS or not column:
            raise UserError(
                f"{spec!r} names columns by {part!r}; expected image=COLUMN, caption=COLUMN or label=COLUMN"
            )
        chosen.setdefault(kind, []).append(column)
    for kind in ("image", "label"):
        if len(chosen.get(kind, ())) > 1:
            raise UserError(f"{spec!r} names several columns as {kind}; only caption may have several")
    return location, chosen


def find_columns(schema: "pa.Schema", chosen: ChosenColumns, where: str, *, require_captions: bool) -> Columns:
    """The columns of a table with images, captions and labels.

    Args:
        schema: of the table.
        chosen: columns that the user named, by kind.
        where: the table's name, for messages.
        require_captions: whether a table without captions is an error.

    Raises:
        UserError: a named column does not exist; there is no column of images, or none of captions although they are
            required, or neither captions nor labels; the message lists the columns.
    """
    if missing := [name for names in chosen.values() for name in names if name not in schema.names]:
        raise UserError(f"{where} has no column {', '.join(missing)}; found: {', '.join(schema.names) or 'nothing'}")
    image = chosen.get("image") or find_image(schema)
    captions = find_captions(schema, chosen.get("caption", []), image)
    label = chosen.get("label") or [
        name for name in by_preference(schema.names, LABEL_NAMES) if is_label(schema.field(name).type)
    ]
    what = ""
    if not image:
        what = "images (such as image, filepath, path, url)"
    elif require_captions and not captions:
        what = "captions (such as caption, text, title)"
    elif not captions and not label:
        what = "captions or labels (such as caption, text, title, label, class)"
    if what:
        raise UserError(
            f"{where} has no column of {what}; found: {', '.join(schema.names) or 'nothing'}; name it: "
            f"{where}#image=COLUMN,{'caption=COLUMN' if require_captions else 'label=COLUMN'}"
        )
    return Columns(image[0], tuple(captions), label[0] if label else "")


def by_preference(names: Sequence[str], preferred: Sequence[str]) -> list[str]:
    """Those of the names that are among the preferred ones, in upper or lower case, in the order of preference.

    >>> by_preference(["URL", "TEXT", "id"], ["text", "url"])
    ['TEXT', 'URL']
    """
    rank = {name: number for number, name in enumerate(preferred)}
    return sorted((name for name in names if name.lower() in rank), key=lambda name: rank[name.lower()])


def find_image(schema: "pa.Schema") -> list[str]:
    """The column of images, or none: one with a usual name, or else the only one that holds encoded images."""
    import pyarrow as pa

    def is_encoded(kind: Any) -> bool:
        return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0

    def is_image(kind: Any) -> bool:
        return is_encoded(kind) or is_binary(kind) or is_text(kind)

    named = [name for name in by_preference(schema.names, IMAGE_NAMES) if is_image(schema.field(name).type)]
    encoded = [field.name for field in schema if is_encoded(field.type)]
    return named[:1] or (encoded if len(encoded) == 1 else [])


def find_captions(schema: "pa.Schema", chosen: Sequence[str], image: Sequence[str]) -> list[Path]:
    """The paths of the captions: in the columns that are named, or else in those of the first usual name."""
    texts = [path for path in walk_texts(schema) if path[0] not in image]
    if chosen:
        within = [path for name in chosen for path in texts if path[0] == name]
        return [path for path in within if len(path) == 1 or path[-1].lower() in CAPTION_NAMES]
    for name in CAPTION_NAMES:
        found = [path for path in texts if path[0].lower() == name and (len(path) == 1 or path[-1] in CAPTION_NAMES)]
        if found:
            return found[:1]
    return [path for path in texts if len(path) == 1 and NUMBERED_CAPTION.fullmatch(path[0].lower())]


def walk_texts(schema: "pa.Schema") -> Iterator[Path]:
    """Yields the paths of all texts and lists of texts, at the top level or in a struct or a list of structs."""
    import pyarrow as pa

    for field in schema:
        kind = item_type(field.type)
        if is_text(kind):
            yield (field.name,)
        elif pa.types.is_struct(kind):
            for inner in kind:
                if is_text(item_type(inner.type)):
                    yield field.name, inner.name


def item_type(kind: Any) -> Any:
    """The type of the items of a list, or the type itself."""
    import pyarrow as pa

    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds text."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_binary(kind: Any) -> bool:
    """Whether an Arrow type holds bytes."""
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_label(kind: Any) -> bool:
    """Whether an Arrow type holds class ids or indices, or lists of them."""
    import pyarrow as pa

    return pa.types.is_integer(item_type(kind)) or is_text(item_type(kind))


def class_names(schema: "pa.Schema", column: str) -> list[str] | None:
    """The names of the classes that a column of Hugging Face's type `ClassLabel` indexes; None for other columns.

    None as well where the names only count: "0", "1", …
    """
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]
        feature = info["features"][column]
        while isinstance(feature, list) or "feature" in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        names = [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return None if names == [str(i) for i in range(len(names))] else names
