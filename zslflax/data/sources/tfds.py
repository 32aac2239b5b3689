"""Image-caption datasets of tensorflow_datasets, read from ArrayRecord files without TensorFlow."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zslflax.errors import UserError

CAPTION_NAMES = ("caption", "captions", "text", "texts")
LABEL_NAMES = ("label", "labels")


class TfdsSource:
    """Raw records of a prepared TFDS dataset, as `zslflax.data.pipeline.open_source` describes them.

    The features are found by kind and name: the image (`image` where there are several); the captions in
    `caption`, `captions`, `text` or `texts`, a text or a sequence of texts, or one level deeper as in
    coco_captions' `captions: {text}`; the label in the class label, or sequence of them, called `label` or
    `labels`, or else the only one there is, at the top or one level deeper. Class labels below 0 mean
    unlabelled and are left out.

    Attributes:
        classes: the names of the label's classes, which for ImageNet are WordNet's ids; None where it has only
            numbers, or there is no label.

    Args:
        name: "NAME", "NAME/CONFIG", each with ":VERSION" if not the newest is meant.
        split: "train", "test", or a slice, "train[:10%]".
        data_dir: the folder that holds the folder NAME; None: $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
        require_captions: whether features without captions are an error.

    Raises:
        ValueError: no such prepared dataset or split, no image, no captions, or TFRecord files alone; the
            message has the command of tfds that helps.
    """

    negatives, excluded = None, {}

    def __init__(self, name: str, split: str, data_dir: str | None = None, *, require_captions: bool = False):
        import tensorflow_datasets as tfds

        folder = find_folder(name, Path(data_dir or tfds.core.constants.DATA_DIR).expanduser())
        builder = tfds.builder_from_directory(folder)
        array_record = tfds.core.file_adapters.FileFormat.ARRAY_RECORD
        formats = builder.info.available_file_formats()
        if array_record not in formats:
            raise UserError(
                f"{folder} holds no ArrayRecord files, which random access needs, only "
                f"{', '.join(f.value for f in formats) or 'no data'}; convert it once, where "
                f"TensorFlow is installed:\n  tfds convert_format --dataset_version_dir={folder} "
                "--out_file_format=array_record"
            )
        if split.partition("[")[0] not in builder.info.splits:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        features = builder.info.features
        self.name = f"tfds:{name}/{split}"
        self.image = find_image(features, folder)
        self.caption, self.label = find_captions(features), find_labels(features)
        self.classes = class_names(dict(walk(features))[self.label]) if self.label else None
        if require_captions and not self.caption:
            raise UserError(
                f"{folder} has no captions among its features {', '.join(features)}; "
                f"expected text that is called {', '.join(CAPTION_NAMES)}"
            )
        self.records = builder.as_data_source(
            split=split, decoders={self.image: tfds.decode.SkipDecoding()}, file_format=array_record
        )

    def __len__(self) -> int:
        return len(self.records)

    def names(self) -> Iterator[str]:
        """Yields the records' names, in order."""
        return (f"{self.name}:{index}" for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        captions = flatten(follow(record, self.caption))
        text = tuple(c.decode(errors="replace") if isinstance(c, bytes) else str(c) for c in captions)
        label = tuple(dict.fromkeys(int(c) for c in flatten(follow(record, self.label)) if c >= 0))
        return {"image": record[self.image], "text": text, "label": label, "name": f"{self.name}:{index}"}


def find_folder(name: str, root: Path) -> Path:
    """The folder of a prepared dataset's version: ROOT/NAME[/CONFIG]/VERSION.

    Found by its files and not by tfds.builder, whose code for many datasets needs TensorFlow.
    """
    path, _, version = name.partition(":")
    folders = [info.parent for info in (root / path).rglob("dataset_info.json") if is_version(info.parent.name)]
    folders = [folder for folder in folders if not version or folder.name == version]
    if not folders:
        prepared = sorted({p.parent.parent.relative_to(root).as_posix() for p in root.glob("*/**/dataset_info.json")})
        raise UserError(
            f"there is no prepared dataset {name!r} in {root}, only: {', '.join(prepared) or 'none'}; "
            "set data.tfds_dir, or prepare it, where TensorFlow is installed:\n"
            f"  tfds build {name} --data_dir={root} --file_format=array_record"
        )
    configs = sorted({folder.parent.relative_to(root).as_posix() for folder in folders})
    if len(configs) > 1:
        raise UserError(f"tfds:{name} has several configs in {root}; say which: {', '.join(configs)}")
    return max(folders, key=lambda folder: tuple(map(int, folder.name.split("."))))


def is_version(name: str) -> bool:
    return len(parts := name.split(".")) == 3 and all(part.isdigit() for part in parts)


def find_image(features, folder: Path) -> str:
    import tensorflow_datasets as tfds

    found = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not found or (len(found) > 1 and "image" not in found):
        raise UserError(
            f"{folder} has {'several images' if found else 'no image'} among its features "
            f"{', '.join(features)}; expected one, or one that is called image"
        )
    return "image" if "image" in found else found[0]


def find_captions(features) -> tuple[str, ...]:
    """The path of the captions among the features, () if there are none."""
    paths = [path for path, feature in walk(features) if path[-1] in CAPTION_NAMES and is_text(feature)]
    return min(paths, key=lambda path: (len(path), CAPTION_NAMES.index(path[-1])), default=())


def find_labels(features) -> tuple[str, ...]:
    """The path of the class labels among the features, () if there are none or it is not clear which."""
    import tensorflow_datasets as tfds

    paths = [path for path, feature in walk(features) if isinstance(feature, tfds.features.ClassLabel)]
    for depth in (1, 2):
        there = [path for path in paths if len(path) == depth]
        called = [path for path in there if path[-1] in LABEL_NAMES]
        if len(called or there) == 1:
            return (called or there)[0]
    return ()


def class_names(label) -> list[str] | None:
    """The names of a class label, None if it has only a number of classes, which are then called "0", "1", …"""
    names = list(label.names)
    return None if names == [str(i) for i in range(len(names))] else names


def walk(features, prefix: tuple[str, ...] = ()):
    """Yields (path, feature) of all features, sequences replaced by what they hold."""
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        while isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from walk(feature, (*prefix, name))
        else:
            yield (*prefix, name), feature


def is_text(feature) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Text) or np.dtype(feature.np_dtype).kind in "OSU"


def follow(record, path: tuple[str, ...]):
    """What lies at a path; nothing at the empty one."""
    if not path:
        return []
    for name in path:
        record = record[name]
    return record


def flatten(value) -> list:
    """The leaves of nested lists and arrays."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, (list, tuple)) else [value]
