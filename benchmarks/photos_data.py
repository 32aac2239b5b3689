"""The photographs of benchmarks/study_photos.py: which are trained on, with which sentences, and which are held out."""

import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zslflax.config import eval_set
from zslflax.data.sources.recaptioned import Recaptioned
from zslflax.data.sources.subset import Subset
from zslflax.data.sources.webdataset import WebDataset

HELD_OUT = 25  # photographs of each class that hyper-parameters are chosen on


class Pairs(NamedTuple):
    """Training pairs of which it is known whether the sentence is wrong.

    Attributes:
        index: of each pair's photograph among all, int64 [n], ascending.
        captions: n sentences.
        wrong: whether the sentence is of another class, bool [n].
        source: the pairs as training takes them.
    """

    index: np.ndarray
    captions: list[str]
    wrong: np.ndarray
    source: Subset


class Photos:
    """The photographs and sentences in a folder (see benchmarks/study_photos.py).

    Attributes:
        source: all training photographs with their own sentences.
        names: of all classes.
        labels: the class of each training photograph, int64 [n].
        held_out: which photographs hyper-parameters are chosen on, bool [n]: `HELD_OUT` of each class.
        test: the test photographs; their labels are `test_labels`, int64 [m].
        unseen: the classes without training photographs, ascending.
        test_set: the section of a config that evaluates on `test`.
    """

    def __init__(self, folder: Path):
        self.source = WebDataset(str(folder / "train-*.tar"))
        self.test = WebDataset(str(folder / "test-*.tar"))
        self.names = (folder / "names.txt").read_text().strip().split("\n")
        number = {name: i for i, name in enumerate(self.names)}
        sentences = json.loads((folder / "sentences.json").read_text())
        self.sentences = {number[name]: of_class for name, of_class in sentences.items()}
        true = read_classes(sorted(folder.glob("train-*.tar")))
        self.labels = np.array([number[true[name.rpartition(":")[2]]] for name in self.source.names()])
        self.captions = [self.source.read_annotations(i)["text"][0] for i in range(len(self.source))]
        self.test_labels = np.array([self.test.read_annotations(i)["label"][0] for i in range(len(self.test))])
        self.held_out = self.drawn(np.ones(len(self.labels), bool), HELD_OUT, seed=0)
        unseen = (folder / "unseen.txt").read_text().strip().split(",")
        self.unseen = np.array(sorted(number[name] for name in unseen))
        test, names = str(folder / "test-*.tar"), str(folder / "names.txt")
        self.test_set = eval_set(data=test, class_names=names, unseen=",".join(unseen))

    def drawn(self, among: np.ndarray, per_class: int, seed: int) -> np.ndarray:
        """Draws the same number of photographs of each class: bool [n]."""
        rng, chosen = np.random.default_rng([1, seed]), np.zeros(len(self.labels), bool)
        for label in np.unique(self.labels):
            chosen[rng.permutation(np.flatnonzero(among & (self.labels == label)))[:per_class]] = True
        return chosen

    def pairs(self, size: int, noise: float, seed: int, held_out: bool) -> Pairs:
        """Draws pairs, of which a share `noise` has a sentence of another class.

        The photographs do not depend on the noise, and the wrong ones at a noise are among those at a higher one.

        Args:
            size: n, as many of each class; all that are left where it is larger than these.
            noise: share of the pairs that are wrong.
            seed: of the draw.
            held_out: whether the held-out photographs are left out.
        """
        among = ~self.held_out if held_out else np.ones(len(self.labels), bool)
        index = np.flatnonzero(self.drawn(among, size // len(np.unique(self.labels)), seed))
        rng = np.random.default_rng([2, seed])
        wrong = rng.permutation(len(index)) < round(noise * len(index))
        classes, captions = np.unique(self.labels), list(self.captions)
        for position, is_wrong in zip(index, wrong, strict=True):
            other = rng.choice(classes[classes != self.labels[position]])
            sentence = rng.choice(self.sentences[int(other)])  # drawn for every pair, so that draws do not shift
            if is_wrong:
                captions[position] = str(sentence)
        source = Subset(Recaptioned(self.source, captions), index)
        return Pairs(index, [captions[position] for position in index], wrong, source)


def kept_pairs(pairs: Pairs, scores: np.ndarray, left_out: float) -> Pairs:
    """The pairs without the share that has the lowest scores."""
    kept = np.sort(np.argsort(scores, kind="stable")[round(left_out * len(scores)) :])
    source = Subset(pairs.source.source, pairs.index[kept])
    return Pairs(pairs.index[kept], [pairs.captions[i] for i in kept], pairs.wrong[kept], source)


def read_classes(shards: list[Path]) -> dict[str, str]:
    """The class name of each sample by its key."""
    true = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    true[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))["true"]
    return true


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """The probability that a right pair has a higher score than a wrong one, without ties."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    right = ~wrong
    return float((ranks[right].sum() - right.sum() * (right.sum() + 1) / 2) / (right.sum() * wrong.sum()))
