"""Reads the nouns of WordNet from its own database files: their words and their hypernyms by id."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from zslflax.errors import MissingFileError, UserError

FILE = "data.noun"
HYPERNYMS = ("@", "@i")  # a kind of, and an instance of


@dataclasses.dataclass(frozen=True)
class WordNet:
    """Nouns by id. As in ImageNet, an id is "n" and the eight digits of the synset's byte offset in the file.

    Attributes:
        lemmas: id → its words, in WordNet's order, with blanks instead of underscores.
        hypernyms: id → the ids of what it is a kind or an instance of; () for the root, "entity".
    """

    lemmas: dict[str, tuple[str, ...]]
    hypernyms: dict[str, tuple[str, ...]]

    def names(self, ids: Sequence[str]) -> list[str]:
        """Joins all lemmas of each id in one string, "tench, Tinca tinca", as in ImageNet's own lists.

        Raises:
            UserError: an id is not in this WordNet.
        """
        if unknown := [i for i in ids if i not in self.lemmas]:
            raise UserError(
                f"{len(unknown)} of {len(ids)} ids are not in this WordNet, the first is {unknown[0]!r}; "
                "ImageNet's ids are of version 3.0"
            )
        return [", ".join(self.lemmas[i]) for i in ids]


def read_wordnet(folder: str | Path) -> WordNet:
    """Reads FOLDER/data.noun, in the format of wndb(5WN). WordNet 3.0 takes half a second.

    ImageNet's ids are of WordNet 3.0, which is Debian's package wordnet-base, in /usr/share/wordnet.

    Raises:
        MissingFileError: there is no such file.
        UserError: a synset does not start at the byte that its id says, or is malformed; names that byte.
    """
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist: expected the folder of WordNet's database files, such as "
            "/usr/share/wordnet of Debian's package wordnet-base"
        )
    lemmas, hypernyms, offset = {}, {}, 0
    with open(path, "rb") as file:
        for line in file:
            if not line.startswith(b"  "):  # the licence
                try:
                    synset, words, above = parse_synset(line, offset)
                except (ValueError, IndexError) as error:
                    raise UserError(f"{path} is damaged at byte {offset}: {error}") from None
                lemmas[synset], hypernyms[synset] = words, above
            offset += len(line)
    if unknown := {synset for above in hypernyms.values() for synset in above} - hypernyms.keys():
        raise UserError(f"{path} is cut short: it lacks {min(unknown)}, which is a hypernym in it")
    return WordNet(lemmas, hypernyms)


def parse_synset(line: bytes, offset: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Parses a line of data.noun: the synset's id, its words and its hypernyms' ids.

    "00002137 03 n 02 abstraction 0 abstract_entity 0 010 @ 00001740 n 0000 + … | gloss": offset, file number,
    part of speech, number of words (hexadecimal), words with a sense number each, number of pointers
    (decimal), pointers of four fields each.

    Args:
        line: with or without its end.
        offset: of the line in the file, in bytes.

    Raises:
        ValueError, IndexError: the line is malformed or says another offset.
    """
    fields = line.partition(b"|")[0].decode("ascii").split()
    if int(fields[0]) != offset:
        raise ValueError(f"the synset says that it is at {fields[0]}")
    words_end = 4 + 2 * int(fields[3], 16)
    pointers_end = words_end + 1 + 4 * int(fields[words_end])
    if len(fields) != pointers_end:
        raise ValueError(f"expected {pointers_end} fields before the gloss, found {len(fields)}")
    words = tuple(word.replace("_", " ") for word in fields[4:words_end:2])
    pointers = zip(fields[words_end + 1 :: 4], fields[words_end + 2 :: 4])
    return f"n{fields[0]}", words, tuple(f"n{target}" for symbol, target in pointers if symbol in HYPERNYMS)
