"""The photographs of benchmarks/photos_data.py as labelled images without sentences, for classifiers."""

import tarfile
from pathlib import Path

import numpy as np
from photos_data import Photos

from zslflax.data.sources.shapes import add_member
from zslflax.data.sources.webdataset import WebDataset
from zslflax.evaluation.few_shot_sets import open_labelled


class LabelledPhotos:
    """The photographs, and shards with labels that are written into a folder.

    Attributes:
        folder: has train.tar and test.tar (KEY.jpg, KEY.cls), of the classes with training photographs alone.
        names: of these classes, in the order of the labels; also the lines of `folder / "names.txt"`.
        train: the training photographs with their own sentences; `train_labels` are their classes, int64 [n].
        test: the photographs of test.tar; `labels` are their classes, int64 [m].
        novel: test photographs of the other classes.
    """

    def __init__(self, data: Path, folder: Path):
        photos = Photos(data)
        known, self.train_labels = np.unique(photos.labels, return_inverse=True)
        number = {label: i for i, label in enumerate(known.tolist())}
        test_labels = [number.get(label) for label in photos.test_labels.tolist()]
        self.folder, self.names, self.train = folder, [photos.names[i] for i in known], photos.source
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "names.txt").write_text("\n".join(self.names) + "\n")
        write_labelled(folder / "train.tar", photos.source, self.train_labels.tolist())
        write_labelled(folder / "test.tar", photos.test, test_labels)
        self.test = WebDataset(str(folder / "test.tar"))
        self.labels = np.array([self.test.read_annotations(i)["label"][0] for i in range(len(self.test))])
        self.novel = open_labelled(str(data / "test-*.tar"), photos.names, [photos.names[i] for i in photos.unseen])


def write_labelled(path: Path, source: WebDataset, labels: list[int | None]) -> None:
    """Writes the images of a source that have a label, in their order, as a shard; one that exists is left."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for index, label in enumerate(labels):
            if label is not None:
                add_member(tar, f"{index:06}.jpg", source[index]["image"])
                add_member(tar, f"{index:06}.cls", str(label).encode())
    partial.rename(path)
