"""Open Images: its human-verified labels, in the files of its versions 4 to 7."""

import collections
import logging
from pathlib import Path

from zslflax.data.sources.class_lists import read_classes
from zslflax.data.sources.image_files import find_images, report_missing
from zslflax.data.sources.labelled import LabelledImages, existing_folder_and_file
from zslflax.errors import MissingFileError, UserError
from zslflax.files import local_path, read_columns

log = logging.getLogger("zslflax")

FORM = "open_images:FOLDER or open_images:FOLDER,LABELS.csv"
# The names of the published files, which start with their version from 6 on; and where FiftyOne puts its copies.
LABELS = ("*test-annotations-human-imagelabels.csv", "test/labels/classifications.csv")
DESCRIPTIONS = ("*class-descriptions.csv", "test/metadata/classes.csv")
IMAGE_FOLDERS = ("test", "images/test", "images", "")
OTHER_SPLITS = ("train", "validation")


def read_open_images(spec: str) -> LabelledImages:
    """Reads the test images of Open Images with their human-verified labels.

    "FOLDER" holds the files as they are published, in it or in a folder in it: the images, test/IMAGEID.jpg; the
    labels, [oidv7-]test-annotations-human-imagelabels.csv; and [oidv7-]class-descriptions.csv, all of whose classes are
    the images' candidates. "FOLDER,LABELS.csv" names images FOLDER/…/IMAGEID.jpg and a file of labels, whose classes
    are those in the file.

    A file of labels has the columns ImageID, LabelName (a MID) and Confidence: 1 for a label, 0 for a negative. Where
    people disagree about a label of an image, it counts as neither.

    Raises:
        MissingFileError: a file or folder is not there.
        UserError: there are several of a file, or a file cannot be used.
    """
    if not local_path(spec, "the source").is_dir():
        folder, file = existing_folder_and_file(spec, FORM)
        return read_verified_labels(folder, file)
    root = local_path(spec, "the source")
    labels, descriptions = find_file(root, LABELS), find_file(root, DESCRIPTIONS)
    if labels is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:10])
        raise MissingFileError(f"{root} has no {LABELS[0]}; expected {FORM}; found: {found or 'nothing'}")
    images = next(root / name for name in IMAGE_FOLDERS if (root / name).is_dir())
    names = read_classes(str(descriptions))[1] if descriptions else None
    log.info(
        "%s: labels of %s, class names of %s", images, labels.name, descriptions.name if descriptions else "no file"
    )
    return read_verified_labels(images, labels, names)


def find_file(root: Path, patterns: tuple[str, ...]) -> Path | None:
    """The file of a folder, or of a folder in it, that matches the first of the patterns for which there is one.

    Raises:
        UserError: several files match one pattern.
    """
    inner = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(OTHER_SPLITS))
    for pattern in patterns:
        found = sorted(path for folder in (root, *inner) for path in folder.glob(pattern))
        if len(found) > 1:
            raise UserError(
                f"{root} has several files {pattern}: {', '.join(str(path.relative_to(root)) for path in found)}; "
                "leave the one that is meant, or give open_images:FOLDER,LABELS.csv"
            )
        if found:
            return found[0]
    return None


def read_verified_labels(folder: Path, file: Path, names: dict[str, str] | None = None) -> LabelledImages:
    """Reads a file of human-verified labels.

    Args:
        folder: that has the images, at any depth.
        file: of the labels.
        names: of the classes by MID; labels of other classes are left out and counted. None: the classes are those in
            the file, without names.
    """
    path_of_id: dict[str, str] = {}
    for path in find_images(folder):
        if (other := path_of_id.setdefault(Path(path).stem, path)) != path:
            raise UserError(f"two files are called by the same image id: {other} and {path}")
    # By image: the labels that people deny, and those that they affirm.
    verdicts: dict[str, tuple[set[int], set[int]]] = collections.defaultdict(lambda: (set(), set()))
    missing: set[str] = set()
    label_of_mid = {mid: label for label, mid in enumerate(names or ())}
    unnamed = 0
    for line, (image, mid, confidence) in read_columns(file, ("ImageID", "LabelName", "Confidence")):
        if confidence not in ("0", "1", "0.0", "1.0"):
            raise UserError(
                f"{file}, line {line}: the confidence is {confidence!r}, expected a person's verdict, 1 or 0; "
                "machine-generated labels cannot serve as ground truth"
            )
        if not image or not mid:
            raise UserError(f"{file}, line {line}: the {'label' if image else 'image'} is empty")
        if names is None:
            label_of_mid.setdefault(mid, len(label_of_mid))
        if image not in path_of_id:
            missing.add(image)
            continue
        verdict = verdicts[image]
        if mid in label_of_mid:
            verdict[confidence.startswith("1")].add(label_of_mid[mid])
        else:
            unnamed += 1
    report_missing(len(missing), len(missing) + len(verdicts), sorted(missing), str(folder))
    disputed = sum(len(denied & affirmed) for denied, affirmed in verdicts.values())
    if disputed:
        log.warning("%d labels of %s are both affirmed and denied, and count as neither", disputed, file)
    if unnamed:
        log.warning("%d labels of %s have no class name, and are left out", unnamed, file)
    return LabelledImages(
        [path_of_id[image] for image in verdicts],
        [tuple(sorted(affirmed - denied)) for denied, affirmed in verdicts.values()],
        list(label_of_mid),
        negatives=[tuple(sorted(denied - affirmed)) for denied, affirmed in verdicts.values()],
        excluded={"missing_images": len(missing), "disputed_labels": disputed, "unnamed_labels": unnamed},
        class_names=None if names is None else list(names.values()),
    )
