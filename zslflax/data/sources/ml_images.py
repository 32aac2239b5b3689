"""Tencent ML-Images: the labels of its annotation lists."""

from pathlib import Path

from zslflax.data.sources.image_files import existing_keys
from zslflax.data.sources.labelled import LabelledImages, existing_folder_and_file
from zslflax.errors import UserError
from zslflax.files import read_text


def read_ml_images(spec: str) -> LabelledImages:
    """Reads "FOLDER,LIST.txt": an annotation list of Tencent ML-Images, of images in FOLDER.

    A line has an image's file or URL, and CLASS:CONFIDENCE after blanks or tabs. CLASS is the number of a line, from
    0, of dictionary_and_semantic_hierarchy.txt, which the config gives as the classes. All classes of an image are
    labels, whatever their confidence (0.8 to 1 in the published lists). The file of a URL …/A/B is B or A_B, the names
    that the dataset's own downloaders give it.
    """
    folder, file = existing_folder_and_file(spec, "ml_images:FOLDER,LIST.txt")
    paths: dict[str, Path] = {}
    labels: dict[str, tuple[int, ...]] = {}
    for line, content in enumerate(read_text(file).split("\n"), start=1):
        if not (fields := content.split()):
            continue
        image, parts = fields[0], fields[0].split("/")
        if image in labels:
            raise UserError(f"{file}, line {line}: {image} comes a second time")
        paths[image] = folder / (parts[-1] if "://" in image else image)
        if "://" in image and not paths[image].is_file():
            paths[image] = folder / "_".join(parts[-2:])
        labels[image] = tuple(dict.fromkeys(parse_class(field, file, line) for field in fields[1:]))
    present = existing_keys(paths, str(folder))
    missing = {"missing_images": len(paths) - len(present)}
    return LabelledImages([paths[i] for i in present], [labels[i] for i in present], excluded=missing)


def parse_class(field: str, file: Path, line: int) -> int:
    """The class in "CLASS:CONFIDENCE" or "CLASS", a field of a line of an annotation list."""
    text, _, confidence = field.partition(":")
    try:
        if not 0 < float(confidence or 1) <= 1:
            raise ValueError
        if (label := int(text)) < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"{file}, line {line}: found {field!r}, expected CLASS:CONFIDENCE, such as 5193:0.9") from None
    return label
