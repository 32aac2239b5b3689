"""WordNet's nouns out of its own database files: what an id is called, and what it is a kind of."""

import dataclasses
from pathlib import Path

from zslflax.errors import MissingFileError, UserError

FILE = "data.noun"
HYPERNYMS = ("@", "@i")  # a kind of, and an instance of


@dataclasses.dataclass(frozen=True)
class WordNet:
    """Nouns by id, which is "n" and the eight digits of the synset's place in the file, as in ImageNet.

    Attributes:
        lemmas: id → its words, in WordNet's order, with blanks instead of underscores.
        hypernyms: id → the ids of what it is a kind or an instance of; () for the root, "entity".
    """

    lemmas: dict[str, tuple[str, ...]]
    hypernyms: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: str | Path) -> "WordNet":
        """Reads FOLDER/data.noun, in the format of wndb(5WN), half a second for WordNet 3.0.

        ImageNet's ids are of WordNet 3.0, which is Debian's package wordnet-base, in /usr/share/wordnet.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: names the byte where the file is not as it should be: every synset starts at its id.
        """
        path = Path(folder).expanduser() / FILE
        if not path.is_file():
            raise MissingFileError(
                f"{path} does not exist: expected the folder of WordNet's database files, such as "
                "/usr/share/wordnet of Debian's package wordnet-base"
            )
        lemmas, hypernyms, at = {}, {}, 0
        with open(path, "rb") as file:
            for line in file:
                if not line.startswith(b"  "):  # the licence
                    try:
                        synset, words, above = parse(line, at)
                    except (ValueError, IndexError) as error:
                        raise UserError(f"{path} is damaged at byte {at}: {error}") from None
                    lemmas[synset], hypernyms[synset] = words, above
                at += len(line)
        if unknown := {synset for above in hypernyms.values() for synset in above} - hypernyms.keys():
            raise UserError(f"{path} is cut short: {min(unknown)} is a hypernym and not in it")
        return cls(lemmas, hypernyms)

    def names(self, ids) -> list[str]:
        """All lemmas of each id in one string, "tench, Tinca tinca", as ImageNet's own lists have them."""
        if unknown := [i for i in ids if i not in self.lemmas]:
            raise UserError(
                f"{len(unknown)} of {len(ids)} ids are not in this WordNet, the first is {unknown[0]!r}; "
                "ImageNet's ids are of version 3.0"
            )
        return [", ".join(self.lemmas[i]) for i in ids]


def parse(line: bytes, at: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """A line of data.noun, which starts at a byte: the synset's id, its words and its hypernyms' ids.

    "00002137 03 n 02 abstraction 0 abstract_entity 0 010 @ 00001740 n 0000 + … | gloss": offset, file number,
    part of speech, number of words (hexadecimal), words with a sense number each, number of pointers
    (decimal), pointers of four fields each.
    """
    fields = line.partition(b"|")[0].decode("ascii").split()
    if int(fields[0]) != at:
        raise UserError(f"the synset says that it is at {fields[0]}")
    words_end = 4 + 2 * int(fields[3], 16)
    pointers_end = words_end + 1 + 4 * int(fields[words_end])
    if len(fields) != pointers_end:
        raise UserError(f"expected {pointers_end} fields before the gloss, found {len(fields)}")
    words = tuple(word.replace("_", " ") for word in fields[4:words_end:2])
    pointers = zip(fields[words_end + 1 :: 4], fields[words_end + 2 :: 4])
    return f"n{fields[0]}", words, tuple(f"n{target}" for symbol, target in pointers if symbol in HYPERNYMS)
