"""Published test sets, read in the folders that their own archives make; class names come from their files."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zslflax.data.images import is_clutter
from zslflax.data.sources.base import Source
from zslflax.data.sources.cifar import CifarImages
from zslflax.data.sources.image_files import existing_keys, find_images
from zslflax.data.sources.imagenet import read_imagenet, read_imagenet21k
from zslflax.data.sources.labelled import LabelledImages, existing_labelled_images
from zslflax.data.sources.ml_images import read_ml_images
from zslflax.data.sources.open_images import read_open_images
from zslflax.errors import MissingFileError
from zslflax.files import local_path, read_json, read_rows, read_text

CAPTIONS_PER_IMAGE = 5  # the first ones; published recalls leave out further captions of COCO


def read_cifar10(spec: str) -> CifarImages:
    """Reads CIFAR-10's test images: cifar-10-batches-py or cifar-10-batches-bin, or the folder that has either."""
    return CifarImages(find_root(spec, "batches.meta", "batches.meta.txt"), fine=False)


def read_cifar100(spec: str) -> CifarImages:
    """Reads CIFAR-100's test images with fine labels: cifar-100-python or cifar-100-binary, or the folder with it."""
    return CifarImages(find_root(spec, "meta", "fine_label_names.txt"), fine=True)


def read_food101(spec: str) -> LabelledImages:
    """Reads Food-101's test images: images/CLASS/ID.jpg, as meta/test.json lists them."""
    root = find_root(spec, "meta/test.json")
    by_class = read_json(root / "meta" / "test.json")
    classes = sorted(by_class)
    pairs = [(f"images/{image}.jpg", label) for label, name in enumerate(classes) for image in by_class[name]]
    return existing_labelled_images(root, pairs, list(map(plain_name, classes)))


def read_pets(spec: str) -> LabelledImages:
    """Reads Oxford-IIIT Pet's test images: images/CLASS_NUMBER.jpg, as annotations/test.txt lists them."""
    root = find_root(spec, "annotations/test.txt")
    rows = read_rows(root / "annotations" / "test.txt", " ")
    names = {int(row[1]): plain_name(row[0].rpartition("_")[0]).title() for _, row in rows}
    label_of = {number: label for label, number in enumerate(sorted(names))}
    pairs = [(f"images/{row[0]}.jpg", label_of[int(row[1])]) for _, row in rows]
    return existing_labelled_images(root, pairs, [names[number] for number in sorted(names)])


def read_flowers102(spec: str) -> LabelledImages:
    """Reads Oxford Flowers' test images: jpg/image_NUMBER.jpg, with the labels and splits of its .mat files.

    The archive has no names of classes: they come from cat_to_name.json, if it is there.
    """
    from scipy.io import loadmat

    root = find_root(spec, "setid.mat")
    labels = loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"].tolist()
    test = loadmat(root / "setid.mat", squeeze_me=True)["tstid"].tolist()
    classes = [str(number) for number in range(1, max(labels) + 1)]
    names = read_json(root / "cat_to_name.json") if (root / "cat_to_name.json").is_file() else {}
    pairs = [(f"jpg/image_{number:05}.jpg", labels[number - 1] - 1) for number in test]
    return existing_labelled_images(root, pairs, classes, [names[i] for i in classes] if names else None)


def read_caltech101(spec: str) -> LabelledImages:
    """Reads Caltech-101: 101_ObjectCategories/CLASS/image_NUMBER.jpg, without BACKGROUND_Google. It has no splits."""
    root = find_root(spec, "101_ObjectCategories", "accordion")
    root = root / "101_ObjectCategories" if (root / "101_ObjectCategories").is_dir() else root
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_clutter(entry.name))
    classes = [name for name in folders if name != "BACKGROUND_Google"]
    images = [find_images(root / name) for name in classes]
    pairs = [(path, label) for label, paths in enumerate(images) for path in paths]
    return existing_labelled_images(root, pairs, list(map(plain_name, classes)))


def read_sun397(spec: str) -> LabelledImages:
    """Reads SUN397: LETTER/CLASS/sun_ID.jpg, with the classes of ClassName.txt.

    The images are those of Testing_01.txt, the first of the published partitions, or all where the file is missing.
    """
    root = find_root(spec, "ClassName.txt")
    ids = [line.strip() for line in read_text(root / "ClassName.txt").splitlines() if line.strip()]
    label_of = {class_id: label for label, class_id in enumerate(ids)}
    partition = next((p for p in (root / "Testing_01.txt", root.parent / "Testing_01.txt") if p.is_file()), None)
    if partition:
        paths = [line.strip().lstrip("/") for line in read_text(partition).splitlines() if line.strip()]
    else:
        paths = [str(Path(path).relative_to(root)) for path in find_images(root)]
    folders = {path: f"/{Path(path).parent.as_posix()}" for path in paths}
    pairs = [(path, label_of[folder]) for path, folder in folders.items() if folder in label_of]
    return existing_labelled_images(root, pairs, [plain_name(class_id[3:]) for class_id in ids])


def read_karpathy(file: Path, folders: Sequence[str]) -> LabelledImages:
    """Reads the test images of a dataset in Karpathy's split, with their first captions.

    Args:
        file: dataset_NAME.json.
        folders: that may have the images, relative to the dataset's.
    """
    images = [image for image in read_json(file)["images"] if image["split"] == "test"]
    roots = [root / folder for root in (file.parent, file.parent.parent) for folder in folders]
    captions = {image_name(image): [sentence["raw"] for sentence in image["sentences"]] for image in images}
    root = next((root for root in roots if captions and (root / next(iter(captions))).is_file()), roots[0])
    if root == roots[0] and not (root / next(iter(captions), "")).is_file():  # filename alone
        captions = {Path(name).name: texts for name, texts in captions.items()}
        root = next((root for root in roots if (root / next(iter(captions), "")).is_file()), roots[0])
    return existing_captioned_images(root, captions)


def image_name(image: dict[str, Any]) -> str:
    """The path of an image of Karpathy's split."""
    return f"{image['filepath']}/{image['filename']}" if image.get("filepath") else str(image["filename"])


def read_coco(spec: str) -> LabelledImages:
    """Reads COCO's captions: Karpathy's test images where there is dataset_coco.json, or else the validation images.

    These are val2017 with annotations/captions_val2017.json, or val2014.
    """
    markers = ("dataset_coco.json", "karpathy/dataset_coco.json", "annotations/dataset_coco.json")
    annotations = ("annotations/captions_val2017.json", "annotations/captions_val2014.json")
    root = find_root(spec, *markers, *annotations)
    if file := next((root / marker for marker in markers if (root / marker).is_file()), None):
        return read_karpathy(file, ("", "images", "val2014"))
    file = next(root / name for name in annotations if (root / name).is_file())
    content = read_json(file)
    name_of = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {name: [] for name in name_of.values()}
    for annotation in content["annotations"]:
        captions[name_of[annotation["image_id"]]].append(annotation["caption"])
    split = file.stem.removeprefix("captions_")
    folder = next((root / name for name in (split, f"images/{split}") if (root / name).is_dir()), root)
    return existing_captioned_images(folder, captions)


def read_flickr30k(spec: str) -> LabelledImages:
    """Reads Flickr30k's captions: the test images of Karpathy's split, which dataset_flickr30k.json lists."""
    root = find_root(spec, "dataset_flickr30k.json")
    return read_karpathy(
        root / "dataset_flickr30k.json", ("", "flickr30k-images", "flickr30k_images", "images", "Images")
    )


READERS: dict[str, Callable[[str], Source]] = {
    "caltech101": read_caltech101,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "coco": read_coco,
    "flickr30k": read_flickr30k,
    "flowers102": read_flowers102,
    "food101": read_food101,
    "imagenet": read_imagenet,
    "imagenet21k": read_imagenet21k,
    "imagenet_a": read_imagenet,
    "imagenet_r": read_imagenet,
    "imagenet_sketch": read_imagenet,
    "imagenet_v2": read_imagenet,
    "ml_images": read_ml_images,
    "open_images": read_open_images,
    "pets": read_pets,
    "sun397": read_sun397,
}


def find_root(spec: str, *markers: str) -> Path:
    """The folder, or the folder in it, that has one of the files.

    Raises:
        MissingFileError: there is none.
    """
    folder = local_path(spec, "the source")
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    for candidate in (folder, *inner):
        if any((candidate / marker).exists() for marker in markers):
            return candidate
    found = ", ".join(entry.name for entry in sorted(folder.iterdir())[:10]) if folder.is_dir() else "no folder"
    raise MissingFileError(f"{folder} has no {' or '.join(markers)}; found: {found or 'nothing'}")


def existing_captioned_images(root: Path, captions: dict[str, list[str]]) -> LabelledImages:
    """The images of a folder that exist, with their first captions."""
    present = existing_keys({path: root / path for path in captions}, str(root))
    return LabelledImages(
        [root / path for path in present],
        [()] * len(present),
        excluded={"missing_images": len(captions) - len(present)} if len(present) < len(captions) else {},
        captions=[tuple(captions[path][:CAPTIONS_PER_IMAGE]) for path in present],
    )


def plain_name(class_id: str) -> str:
    """A class's name in plain words.

    >>> plain_name("church/indoor"), plain_name("apple_pie")
    ('church indoor', 'apple pie')
    """
    return re.sub(r"[_/]+", " ", class_id).strip()
