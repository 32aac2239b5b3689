"""Datasets of tensorflow_datasets, read from ArrayRecord files without TensorFlow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zslflax.data.sources.base import Annotations, Record, hash_values
from zslflax.errors import UserError

CAPTION_NAMES = ("caption", "captions", "text", "texts")
LABEL_NAMES = ("label", "labels")


class TfdsSource:
    """The records of a prepared TFDS dataset, a `Source`.

    Features are recognised by type and name. The image is the only image, or the one called `image`. The captions are
    the text, or sequence of texts, called `caption`, `captions`, `text` or `texts`, at the top level or one level
    deeper, as in coco_captions' `captions: {text}`. The label is the class label, or sequence of class labels, called
    `label` or `labels`, or else the only one, at the top level or one level deeper. Class labels below 0 mean
    unlabelled and are left out.

    Args:
        name: "NAME" or "NAME/CONFIG", with ":VERSION" for a version other than the newest.
        split: "train", "test", or a slice, "train[:10%]".
        data_dir: the folder that has the folder NAME; None: $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
        require_captions: whether a dataset without captions is an error.

    Attributes:
        classes: the names of the label's classes, which for ImageNet are WordNet ids; None where the dataset has no
            label, or only numbers its classes.

    Raises:
        UserError: there is no such prepared dataset or split, no image or no captions, or there are only TFRecord
            files; the message has the `tfds` command that helps.
    """

    negatives: list[tuple[int, ...]] | None = None
    excluded: dict[str, int] = {}

    def __init__(self, name: str, split: str, data_dir: str | Path | None = None, *, require_captions: bool = False):
        import tensorflow_datasets as tfds

        folder = find_dataset_folder(name, Path(data_dir or tfds.core.constants.DATA_DIR).expanduser())
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
        self.name, self.version = f"tfds:{name}/{split}", folder.name
        self.file_sizes = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
        self.image_feature = find_image(features, folder)
        self.caption_path, self.label_path = find_captions(features), find_labels(features)
        label_feature = dict(walk_features(features)).get(self.label_path)
        self.classes = None if label_feature is None else named_classes(label_feature)
        if require_captions and not self.caption_path:
            raise UserError(
                f"{folder} has no captions among its features {', '.join(features)}; "
                f"expected text that is called {', '.join(CAPTION_NAMES)}"
            )
        self.records = builder.as_data_source(
            split=split, decoders={self.image_feature: tfds.decode.SkipDecoding()}, file_format=array_record
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = self.records[index]
        return Record(image=record[self.image_feature], **self.parse_annotations(record, index))

    def read_annotations(self, index: int) -> Annotations:
        """The captions and labels of a record. The record is read as a whole; its image is not decoded."""
        return self.parse_annotations(self.records[index], index)

    def parse_annotations(self, record: Any, index: int) -> Annotations:
        """The captions and labels in a record."""
        captions = flatten(value_at(record, self.caption_path))
        text = tuple(c.decode(errors="replace") if isinstance(c, bytes) else str(c) for c in captions)
        label = tuple(dict.fromkeys(int(c) for c in flatten(value_at(record, self.label_path)) if c >= 0))
        return Annotations(text=text, label=label, name=f"{self.name}:{index}")

    def fingerprint(self) -> str:
        """Of the dataset's name and version, the split, and the sizes of its files."""
        return hash_values("tfds", self.name, self.version, len(self), self.file_sizes)

    def names(self) -> Iterator[str]:
        """Yields the names of all records in order."""
        return (f"{self.name}:{index}" for index in range(len(self)))


def find_dataset_folder(name: str, root: Path) -> Path:
    """The folder of a version of a prepared dataset: ROOT/NAME[/CONFIG]/VERSION.

    It is found by its files, not by tfds.builder, whose code for many datasets needs TensorFlow.
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
    """Whether a folder is named like a version.

    >>> is_version("1.0.0"), is_version("1.0"), is_version("small")
    (True, False, False)
    """
    return len(parts := name.split(".")) == 3 and all(part.isdigit() for part in parts)


def find_image(features: Any, folder: Path) -> str:
    """The name of the image feature.

    Args:
        features: a tfds FeaturesDict.
        folder: of the dataset, for messages.
    """
    import tensorflow_datasets as tfds

    found = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not found or (len(found) > 1 and "image" not in found):
        raise UserError(
            f"{folder} has {'several images' if found else 'no image'} among its features "
            f"{', '.join(features)}; expected one, or one that is called image"
        )
    return "image" if "image" in found else found[0]


def find_captions(features: Any) -> tuple[str, ...]:
    """The path of the captions in a FeaturesDict; () if there are none."""
    paths = [path for path, feature in walk_features(features) if path[-1] in CAPTION_NAMES and is_text(feature)]
    return min(paths, key=lambda path: (len(path), CAPTION_NAMES.index(path[-1])), default=())


def find_labels(features: Any) -> tuple[str, ...]:
    """The path of the class labels in a FeaturesDict; () if there are none or it is not clear which."""
    import tensorflow_datasets as tfds

    paths = [path for path, feature in walk_features(features) if isinstance(feature, tfds.features.ClassLabel)]
    for depth in (1, 2):
        candidates = [path for path in paths if len(path) == depth]
        named = [path for path in candidates if path[-1] in LABEL_NAMES]
        if len(named or candidates) == 1:
            return (named or candidates)[0]
    return ()


def named_classes(label_feature: Any) -> list[str] | None:
    """The names of a ClassLabel's classes; None if tfds made them up: "0", "1", …"""
    names = list(label_feature.names)
    return None if names == [str(i) for i in range(len(names))] else names


def walk_features(features: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path, feature) of all features in a FeaturesDict; in place of a sequence, what it holds."""
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        while isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from walk_features(feature, (*prefix, name))
        else:
            yield (*prefix, name), feature


def is_text(feature: Any) -> bool:
    """Whether a feature holds strings."""
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Text) or np.dtype(feature.np_dtype).kind in "OSU"


def value_at(record: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of names in a nested record; [] for the empty path."""
    if not path:
        return []
    for name in path:
        record = record[name]
    return record


def flatten(value: Any) -> list[Any]:
    """The leaves of nested lists and arrays.

    >>> flatten([[1, 2], np.array([3])])
    [1, 2, 3]
    """
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, (list, tuple)) else [value]
