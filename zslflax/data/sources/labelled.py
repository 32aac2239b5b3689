"""Labelled images in their datasets' formats: folders and tars by class, CSV, Open Images, ML-Images."""

import collections
import csv
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from zslflax.data.images import BadSample
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingFileError, UserError

log = logging.getLogger("zslflax")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SHOWN = 3  # examples in a message


class LabelledImages:
    """Raw records of image files, as `zslflax.data.pipeline.open_source` describes them, without captions.

    Attributes:
        classes: ids of the classes, which labels count; None: labels are numbers in a list that others have.
        negatives: n tuples of the classes that were looked for on an image and not found, or None.
        excluded: how many images or annotations were left out, by reason.
    """

    def __init__(self, paths, labels, classes=None, negatives=None, excluded=None):
        self.paths, self.labels, self.classes = list(map(str, paths)), list(labels), classes
        self.negatives, self.excluded = negatives, dict(excluded or {})

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        name = self.paths[index]
        try:
            image = Path(name).read_bytes()
        except OSError as failure:
            error = BadSample(f"its file cannot be read: {failure.strerror}")
            error.name = name
            raise error from failure
        return {"image": image, "text": (), "label": self.labels[index], "name": name}


class ClassTars:
    """Raw records of a folder of tars that each hold the images of one class: n01440764.tar, ….

    Attributes:
        classes: the tars' names without .tar, which labels count.
    """

    negatives, excluded = None, {}

    def __init__(self, tars: Sequence[Path]):
        self.shards = WebDataset([str(tar) for tar in tars])
        self.classes = [tar.stem for tar in tars]
        number = {str(tar): label for label, tar in enumerate(tars)}
        self.labels = [number[path] for path in self.shards.paths]  # a tar that cannot be read is not among them

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict:
        return self.shards[index] | {"label": (self.labels[self.shards.shard_of(index)],)}


def read_folder(spec: str) -> LabelledImages | ClassTars:
    """Of FOLDER: images in its subfolders, or in its tars, which are named by class id and in that order."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is no folder: expected one with a subfolder or tar for each class")
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    subfolders = in_order({entry.name: entry for entry in entries if entry.is_dir()})
    tars = in_order({entry.stem: entry for entry in entries if entry.suffix == ".tar"})
    if bool(subfolders) == bool(tars):
        found = f"both: {subfolders[0].name}, {tars[0].name}" if tars else "neither"
        raise UserError(f"expected subfolders or tars named by class in {folder}, found {found}")
    if tars:
        return ClassTars(tars)
    of_class = [images_in(subfolder) for subfolder in subfolders]
    if empty := [subfolder.name for subfolder, paths in zip(subfolders, of_class) if not paths]:
        log.warning("%d classes of %s have no image%s", len(empty), folder, examples(empty))
    paths = [path for paths in of_class for path in paths]
    if not paths:
        raise UserError(f"none of the {len(subfolders)} subfolders of {folder} has an image")
    labels = [(label,) for label, paths in enumerate(of_class) for _ in paths]
    return LabelledImages(paths, labels, [subfolder.name for subfolder in subfolders])


def read_csv(spec: str) -> LabelledImages:
    """Of FILE.csv: columns `path`, relative to the file's folder, and `labels`, none or more class ids.

    Ids are separated by ";" if there is any in the column, or else by blanks. Rows of the same path are
    united. The classes are all ids that occur, in their order.
    """
    file = Path(spec).expanduser()
    rows = list(read_columns(file, ("path", "labels")))
    separator = ";" if any(";" in labels for _, (_, labels) in rows) else None
    ids = collections.defaultdict(dict)
    for line, (path, labels) in rows:
        if not path:
            raise UserError(f"{file}, line {line}: the path is empty")
        ids[path] |= dict.fromkeys(i.strip() for i in labels.split(separator) if i.strip())
    paths = {path: file.parent / path for path in ids}
    present = existing(paths, f"the folder of {file}")
    classes = in_order({i: i for of_image in ids.values() for i in of_image})
    number = {i: label for label, i in enumerate(classes)}
    return LabelledImages(
        [paths[path] for path in present],
        [tuple(number[i] for i in ids[path]) for path in present],
        classes,
        excluded={"missing_images": len(paths) - len(present)},
    )


def read_open_images(spec: str) -> LabelledImages:
    """Of FOLDER,LABELS.csv: Open Images' human-verified labels of images FOLDER/…/IMAGEID.jpg.

    LABELS.csv is a *-annotations-human-imagelabels.csv with columns ImageID, LabelName (a MID) and
    Confidence: 1 is a label, 0 a negative. Where people disagree on a label of an image, it is neither.
    """
    folder, file = two_paths(spec, "open_images:FOLDER,LABELS.csv")
    found = {}
    for path in images_in(folder):
        if (other := found.setdefault(Path(path).stem, path)) != path:
            raise UserError(f"two files are called by the same image id: {other} and {path}")
    judged, missing, number = collections.defaultdict(lambda: (set(), set())), set(), {}
    for line, (image, mid, confidence) in read_columns(file, ("ImageID", "LabelName", "Confidence")):
        if confidence not in ("0", "1", "0.0", "1.0"):
            raise UserError(
                f"{file}, line {line}: the confidence is {confidence!r}, expected a person's verdict, 1 or 0; "
                "labels that a machine made are no truth to measure by"
            )
        if not image or not mid:
            raise UserError(f"{file}, line {line}: the {'label' if image else 'image'} is empty")
        label = number.setdefault(mid, len(number))
        if image in found:
            judged[image][confidence.startswith("1")].add(label)
        else:
            missing.add(image)
    report(len(missing), len(missing) + len(judged), sorted(missing), str(folder))
    disputed = sum(len(no & yes) for no, yes in judged.values())
    if disputed:
        log.warning("%d labels of %s are both affirmed and denied, and count as neither", disputed, file)
    return LabelledImages(
        [found[image] for image in judged],
        [tuple(sorted(yes - no)) for no, yes in judged.values()],
        list(number),
        negatives=[tuple(sorted(no - yes)) for no, yes in judged.values()],
        excluded={"missing_images": len(missing), "disputed_labels": disputed},
    )


def read_ml_images(spec: str) -> LabelledImages:
    """Of FOLDER,LIST.txt: Tencent ML-Images' annotation list of images in FOLDER.

    A line is an image's file or URL, and CLASS:CONFIDENCE after blanks or tabs, where the class is the number
    of a line, from 0, of dictionary_and_semantic_hierarchy.txt, which is given as the classes. All classes of
    an image are labels, whatever their confidence (0.8 to 1 in the lists that it was seen in). Of a URL …/A/B
    the file is B, or A_B, as the dataset's own downloaders call it.
    """
    folder, file = two_paths(spec, "ml_images:FOLDER,LIST.txt")
    paths, labels = {}, {}
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not (fields := line.split()):
                continue
            image, parts = fields[0], fields[0].split("/")
            if image in labels:
                raise UserError(f"{file}, line {number}: {image} comes a second time")
            paths[image] = folder / (parts[-1] if "://" in image else image)
            if "://" in image and not paths[image].is_file():
                paths[image] = folder / "_".join(parts[-2:])
            labels[image] = tuple(dict.fromkeys(class_number(field, file, number) for field in fields[1:]))
    present = existing(paths, str(folder))
    missing = {"missing_images": len(paths) - len(present)}
    return LabelledImages([paths[i] for i in present], [labels[i] for i in present], excluded=missing)


READERS = {
    "folder": read_folder,
    "csv": read_csv,
    "open_images": read_open_images,
    "ml_images": read_ml_images,
}


def class_number(field: str, file: Path, line: int) -> int:
    label, _, confidence = field.partition(":")
    try:
        if not 0 < float(confidence or 1) <= 1:
            raise ValueError
        if (label := int(label)) < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"{file}, line {line}: found {field!r}, expected CLASS:CONFIDENCE, such as 5193:0.9") from None
    return label


def two_paths(spec: str, form: str) -> tuple[Path, Path]:
    """A folder and a file that exist."""
    parts = [Path(part).expanduser() for part in spec.split(",")]
    if len(parts) != 2:
        raise UserError(f"expected {form}, found {spec!r}")
    if not parts[0].is_dir():
        raise MissingFileError(f"{parts[0]} is no folder; expected {form}")
    if not parts[1].is_file():
        raise MissingFileError(f"there is no file {parts[1]}; expected {form}")
    return parts[0], parts[1]


def read_columns(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields the line's number and these columns' fields of every row of a CSV with a header."""
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}")
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = [name.strip() for name in next(reader, [])]
        if missing := [column for column in columns if column not in header]:
            raise UserError(f"{file} has no column {', '.join(missing)}; found: {', '.join(header) or 'nothing'}")
        at = [header.index(column) for column in columns]
        for row in reader:
            if len(row) == len(header):
                yield reader.line_num, [row[i].strip() for i in at]
            elif row:
                raise UserError(f"{file}, line {reader.line_num} has {len(row)} fields, the header {len(header)}")


def in_order(of_id: dict[str, object]) -> list:
    """The values in the order of their ids: by number where all ids are whole numbers, or else as strings."""
    numbers = all(i.isascii() and i.isdigit() for i in of_id)
    return [of_id[i] for i in sorted(of_id, key=(lambda i: (int(i), i)) if numbers else None)]


def images_in(folder: Path) -> list[str]:
    """All images below a folder, by their extensions, in the order of their paths."""
    return sorted(
        os.path.join(path, name)
        for path, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    )


def existing(paths: dict[str, Path], where: str) -> list[str]:
    """The keys of the paths where there is a file; says how many are missing."""
    present = [key for key, path in paths.items() if path.is_file()]
    kept = set(present)
    report(len(paths) - len(present), len(paths), [key for key in paths if key not in kept], where)
    return present


def report(missing: int, total: int, keys: Sequence[str], where: str) -> None:
    if missing == total:
        raise MissingFileError(
            f"none of the {total} annotated images is in {where}{examples(keys)}"
            if total
            else f"there are no annotations of images in {where}"
        )
    if missing:
        log.warning("%d of %d annotated images are not in %s%s", missing, total, where, examples(keys))


def examples(keys: Sequence[str]) -> str:
    return f" ({', '.join(keys[:SHOWN])}{', …' if len(keys) > SHOWN else ''})" if keys else ""
