"""Reads lists of classes in the files of their datasets: ids, which are unique, and names, which need not be."""

import csv
import os
import re

from zslflax.errors import MissingFileError, UserError
from zslflax.files import read_rows

SYNSET = re.compile(r"n\d{8} +\S")  # a WordNet id and a name
OPEN_IMAGES = ["LabelName", "DisplayName"]
ML_IMAGES_1 = re.compile(r"n\d{8}\t-?\d+")  # the first version: an id and the place of its parent
ML_IMAGES = ["category_index", "category_id", "index_of_parent_category", "category name"]


def read_classes(spec: str) -> tuple[list[str], dict[str, str]]:
    """Reads the classes of one file or of several files with commas between them, united by id.

    A class keeps the place and the name that it has in the first file with its id. The lines of a file, in UTF-8, are:

        ID                   a plain list
        ID <tab> NAME        ImageNet's words.txt
        ID NAME              with WordNet's ids: ImageNet's LOC_synset_mapping.txt
        NUMBER <tab> ID <tab> NUMBER <tab> NAME, with a header: Tencent ML-Images'
                             dictionary_and_semantic_hierarchy.txt, whose first number is the class's place
        ID <tab> NUMBER <tab> NAME, with WordNet's ids: the same in its first version
        ID,NAME              in a .csv: Open Images' class-descriptions, with or without their header

    Returns:
        The ids in order, and the names of the ids that have one.

    Raises:
        MissingFileError: there is no such file.
        UserError: an id or a name is empty, an id occurs twice in one file, or a line has another number of fields than
            the first; names the file and line.
    """
    ids: dict[str, None] = {}  # an ordered set
    names: dict[str, str] = {}
    for path in spec.split(","):
        if not os.path.isfile(path):
            raise MissingFileError(f"there is no file {path!r} of classes")
        for class_id, *name in read_class_file(path):
            ids[class_id] = None
            if name:
                names.setdefault(class_id, name[0])
    return list(ids), names


def read_class_file(path: str) -> list[list[str]]:
    """Reads the classes of one file: [id] each, or [id, name] each; see `read_classes`."""
    is_csv = path.endswith(".csv")
    rows = read_rows(path) if is_csv else read_rows(path, "\t", csv.QUOTE_NONE)
    if rows and rows[0][1][0].startswith(("{", "[")):
        raise UserError(f"{path} is JSON; expected lines with the ids of the classes, ID or ID <tab> NAME")
    if not is_csv and rows and all(len(row) == 1 and SYNSET.match(row[0]) for _, row in rows):
        rows = [(number, row[0].split(maxsplit=1)) for number, row in rows]
    if rows and rows[0][1] == OPEN_IMAGES:
        rows = rows[1:]
    elif rows and rows[0][1] == ML_IMAGES:
        rows = rows[1:]
        for place, (number, row) in enumerate(rows):
            if row[0] != str(place):
                raise UserError(f"{path}, line {number}: the class's number is {row[0]}, expected {place}")
        rows = [(number, row[1:2] + row[3:]) for number, row in rows]
    elif rows and all(len(row) == 3 and ML_IMAGES_1.fullmatch("\t".join(row[:2])) for _, row in rows):
        rows = [(number, [row[0], row[2]]) for number, row in rows]
    if not rows:
        raise UserError(f"{path} has no classes")
    fields = len(rows[0][1])
    if fields not in ((2,) if is_csv else (1, 2)):
        raise UserError(f"{path} starts with {rows[0][1]}, expected {'ID,NAME' if is_csv else 'ID or ID <tab> NAME'}")
    lines: dict[str, int] = {}  # of each id
    for number, row in rows:
        if len(row) != fields:
            raise UserError(f"{path}, line {number} has {len(row)} fields, the first {fields}")
        if "" in row:
            raise UserError(f"{path}, line {number}: the {'name' if row[0] else 'id'} is empty: {row}")
        if row[0] in lines:
            raise UserError(f"{path}, line {number}: the id {row[0]!r} is that of line {lines[row[0]]} too")
        lines[row[0]] = number
    return [row for _, row in rows]
