"""ImageNet's validation images, its variants, and ImageNet-21k; class names come from files beside the images."""

import re
from collections.abc import Sequence
from pathlib import Path

from zslflax.data.sources.class_lists import read_classes
from zslflax.data.sources.image_files import find_images
from zslflax.data.sources.labelled import ClassTars, LabelledImages, existing_labelled_images
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingFileError, UserError
from zslflax.files import local_path, read_columns, read_text

WORDNET_ID = re.compile(r"n\d{8}")
NAMES = "LOC_synset_mapping.txt"  # of the archive on Kaggle: lines "n01440764 tench, Tinca tinca"
FOLDERS = (
    *("", "val", "validation", "ILSVRC/Data/CLS-LOC/val", "imagenet-r", "imagenet-a", "sketch"),
    "imagenetv2-matched-frequency-format-val",
)
# Of ImageNet-21k: ImageNet's own list of all synsets, timm's, and BiT's list of names with its list of ids.
NAMES_21K = ("words.txt", "imagenet_synset_to_lemma.txt", NAMES)
LEMMAS_21K, IDS_21K = "imagenet21k_wordnet_lemmas.txt", "imagenet21k_wordnet_ids.txt"
# The archives' own folders, and those of the processed ImageNet-21K-P, whose test images are in the first.
FOLDERS_21K = ("imagenet21k_val", "val", "", "winter21_whole", "fall11_whole", "images")


def read_imagenet(spec: str) -> LabelledImages:
    """Reads ImageNet's validation images, or ImageNet-V2, -R, -A or -Sketch, in class folders.

    The folders are called by WordNet's ids; those of ImageNet-V2 by the numbers of the classes, in the order of ids.
    The validation images may also be in one folder, with LOC_val_solution.csv. Names are the first ones that
    LOC_synset_mapping.txt gives, in the folder or one of the two above it.
    """
    given = existing_folder(spec)
    names = first_names(given)
    ids = list(names)
    root, folders = next(
        ((given / name, found) for name in FOLDERS if (found := class_folders(given / name))), (given, [])
    )
    if not folders:
        return read_kaggle_imagenet(given, names)
    if folders[0].isdigit():
        if len(ids) <= int(folders[-1]):
            raise UserError(
                f"the folders of {root} are numbers of ImageNet's classes: put {NAMES}, which lists them, into {given}"
            )
        classes = ids
        label_of = {folder: int(folder) for folder in folders}
    else:
        classes, label_of = folders, {folder: label for label, folder in enumerate(folders)}
    pairs = [(path, label_of[folder]) for folder in folders for path in find_images(root / folder)]
    return existing_labelled_images(root, pairs, classes, names_of(classes, names))


def read_imagenet21k(spec: str) -> LabelledImages | ClassTars:
    """Reads ImageNet-21k: a folder or a tar for each class, which are called by WordNet's ids.

    An id is one class, also where others have the same name, as two classes "crane" have. Names are all that a file
    gives to an id, in the folder or one of the two above it: words.txt, imagenet_synset_to_lemma.txt,
    LOC_synset_mapping.txt, or imagenet21k_wordnet_lemmas.txt with imagenet21k_wordnet_ids.txt.
    """
    given = existing_folder(spec)
    names = names_21k(given)
    for root in (given / name for name in FOLDERS_21K):
        if folders := [name for name in class_folders(root) if WORDNET_ID.fullmatch(name)]:
            paths = {name: find_images(root / name) for name in folders}
            if not any(paths.values()):
                raise MissingFileError(f"none of the {len(folders)} class folders of {root} has an image")
            labels = [(label,) for label, name in enumerate(folders) for _ in paths[name]]
            images = [path for name in folders for path in paths[name]]
            return LabelledImages(images, labels, folders, class_names=names_of(folders, names))
        if tars := [tar for tar in sorted(root.glob("n*.tar")) if WORDNET_ID.fullmatch(tar.stem)]:
            return ClassTars(WebDataset(list(map(str, tars))), tars, names_of([tar.stem for tar in tars], names))
    raise MissingFileError(f"{given} has no folder or tar for each class, such as n01440764 or n01440764.tar")


def existing_folder(spec: str) -> Path:
    """The folder of a specification."""
    folder = local_path(spec, "the source")
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {folder}")
    return folder


def find_beside(folder: Path, *names: str) -> Path | None:
    """The first of these files in a folder or one of the two above it."""
    places = (parent / name for parent in (folder, *list(folder.absolute().parents)[:2]) for name in names)
    return next((place for place in places if place.is_file()), None)


def first_names(folder: Path) -> dict[str, str]:
    """The first name of each of ImageNet's classes, by id, in the order of ids; {} where no file has them."""
    file = find_beside(folder, NAMES)
    names = read_classes(str(file))[1] if file else {}
    return {class_id: names[class_id].split(",")[0].strip() for class_id in sorted(names)}


def names_21k(folder: Path) -> dict[str, str]:
    """The names of WordNet's ids, "tench, Tinca tinca"; {} where no file has them."""
    if file := find_beside(folder, *NAMES_21K):
        return read_classes(str(file))[1]
    lemmas, ids = find_beside(folder, LEMMAS_21K), find_beside(folder, IDS_21K)
    if not (lemmas and ids):
        return {}
    values, keys = (read_text(path).split("\n") for path in (lemmas, ids))
    values, keys = ([line.strip() for line in lines if line.strip()] for lines in (values, keys))
    if len(values) != len(keys):
        raise UserError(f"{lemmas} has {len(values)} lines and {ids} has {len(keys)}; expected a name for each id")
    return dict(zip(keys, (value.replace("_", " ") for value in values)))


def names_of(classes: Sequence[str], names: dict[str, str]) -> list[str] | None:
    """The name of each class; None where a class has none."""
    return [names[class_id] for class_id in classes] if names.keys() >= set(classes) else None


def class_folders(folder: Path) -> list[str]:
    """The subfolders that are called by WordNet's ids, or else those that are called by numbers, in order."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    by_id = sorted(name for name in names if WORDNET_ID.fullmatch(name))
    return by_id or sorted((name for name in names if name.isdigit()), key=int)


def read_kaggle_imagenet(folder: Path, names: dict[str, str]) -> LabelledImages:
    """Reads ImageNet's validation images in one folder, whose classes LOC_val_solution.csv lists."""
    solution = folder / "LOC_val_solution.csv"
    if not (solution.is_file() and names):
        raise MissingFileError(
            f"{folder} has no class folders, such as val/n01440764, and not both LOC_val_solution.csv and "
            f"{NAMES} either"
        )
    images = next((folder / name for name in (*FOLDERS[1:4], "") if (folder / name).is_dir()), folder)
    label_of = {class_id: label for label, class_id in enumerate(names)}
    rows = [row for _, row in read_columns(solution, ("ImageId", "PredictionString"))]
    ids = {image: prediction.split(" ")[0] for image, prediction in rows}
    if unknown := set(ids.values()) - set(names):
        raise UserError(f"{solution} has the class {min(unknown)!r}, which {NAMES} lacks")
    pairs = [(f"{image}.JPEG", label_of[class_id]) for image, class_id in ids.items()]
    return existing_labelled_images(images, pairs, list(names), list(names.values()))
