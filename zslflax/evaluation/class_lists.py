"""Lists of classes as their datasets have them: ids, which are keys, and names, which are not."""

import csv
import os

from zslflax.errors import UserError

OPEN_IMAGES = ["LabelName", "DisplayName"]
ML_IMAGES = ["category_index", "category_id", "index_of_parent_category", "category name"]


def read_classes(spec: str) -> tuple[list[str], dict[str, str]]:
    """Ids, and the names of those that the files name: a file or several with commas, united by id.

    A class is where its id comes first, and is called what its first name is. Lines of a file are, in UTF-8:

        ID                   a plain list
        ID <tab> NAME        ImageNet's words.txt
        NUMBER <tab> ID <tab> NUMBER <tab> NAME, with a header: Tencent ML-Images'
                             dictionary_and_semantic_hierarchy.txt, whose first number is the class's place
        ID,NAME              in a .csv: Open Images' class-descriptions, with or without their header

    Raises:
        ValueError: names the file and line: an empty id or name, an id that comes twice in one file, a line
            that has another number of fields than the first.
    """
    ids, names = {}, {}
    for path in spec.split(","):
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path!r} of classes")
        rows, lines = read_rows(path), {}
        fields = len(rows[0][1])
        for number, row in rows:
            if len(row) != fields:
                raise UserError(f"{path}, line {number} has {len(row)} fields, the first {fields}")
            if "" in row:
                raise UserError(f"{path}, line {number}: the {'name' if row[0] else 'id'} is empty: {row}")
            if row[0] in lines:
                raise UserError(f"{path}, line {number}: the id {row[0]!r} is that of line {lines[row[0]]} too")
            lines[row[0]] = ids[row[0]] = number
            if fields == 2:
                names.setdefault(*row)
    return list(ids), names


def read_rows(path: str) -> list[tuple[int, list[str]]]:
    """The lines of a file that are not blank, numbered from 1: [id], or [id, name]."""
    described = path.endswith(".csv")
    options = {"delimiter": ","} if described else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **options)
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    rows = [(number, row) for number, row in rows if any(row)]
    if rows and rows[0][1] == OPEN_IMAGES:
        rows = rows[1:]
    elif rows and rows[0][1] == ML_IMAGES:
        rows = rows[1:]
        for place, (number, row) in enumerate(rows):
            if row[0] != str(place):
                raise UserError(f"{path}, line {number}: the class's number is {row[0]}, expected {place}")
        rows = [(number, row[1:2] + row[3:]) for number, row in rows]
    if not rows:
        raise UserError(f"{path} has no classes")
    if len(rows[0][1]) not in ((2,) if described else (1, 2)):
        raise UserError(
            f"{path} starts with {rows[0][1]}, expected {'ID,NAME' if described else 'ID or ID <tab> NAME'}"
        )
    return rows
