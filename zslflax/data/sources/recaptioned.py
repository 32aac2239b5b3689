"""The records of a source with other captions."""

from collections.abc import Iterator, Mapping, Sequence

from zslflax.data.sources.base import Annotations, Record, Source


class Recaptioned:
    """A source's records with one given caption each, itself a `Source`.

    Features of the images are kept with those of the source. An example is one set of images that is trained on with
    the captions of several models, one after another.

    Args:
        source: of the images.
        captions: one for each record of the source.

    Raises:
        ValueError: there are not as many captions as records.
    """

    def __init__(self, source: Source, captions: Sequence[str]):
        if len(captions) != len(source):
            raise ValueError(f"{len(captions)} captions for {len(source)} records, expected one for each")
        self.source, self.captions = source, list(captions)

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def negatives(self) -> Sequence[tuple[int, ...]] | None:
        return self.source.negatives

    @property
    def excluded(self) -> Mapping[str, int]:
        return self.source.excluded

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return Record(image=record["image"], text=(self.captions[index],), label=record["label"], name=record["name"])

    def read_annotations(self, index: int) -> Annotations:
        """Reads a record without its image."""
        annotations = self.source.read_annotations(index)
        return Annotations(text=(self.captions[index],), label=annotations["label"], name=annotations["name"])

    def names(self) -> Iterator[str]:
        """Yields the names of all records in order."""
        return self.source.names()

    def fingerprint(self) -> str:
        """The source's: it is of the images, which are the same."""
        return self.source.fingerprint()
