"""Lists the towers and models that there are: `zslflax models [WORD]`."""

import argparse
from collections.abc import Sequence

from zslflax.cli import exit_on_error
from zslflax.errors import UserError
from zslflax.models.known import IMAGE_TOWERS, TEXT_ENCODERS, TWO_TOWER_MODELS, Known

SECTIONS = {
    "Image towers (model.image.name, and model.image.pretrained for published weights)": IMAGE_TOWERS,
    "Text encoders (model.text.pretrained)": TEXT_ENCODERS,
    'Whole models (Predictor.restore, --model, teacher.workdir; their towers alone with model.image.name="")': (
        TWO_TOWER_MODELS
    ),
}


def format_section(title: str, rows: Sequence[Known]) -> str:
    """Formats one kind of models as a table."""
    names, sizes = (max(len(str(value)) for value in column) for column in list(zip(*rows))[:2])
    lines = [f"{row.name:<{names}}  {row.millions:>{sizes}} M  {', '.join(row.hub_ids) or '-'}" for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="zslflax models", description=__doc__)
    parser.add_argument(
        "word", nargs="?", default="", metavar="WORD", help="Only lines with this word, such as dinov2."
    )
    word = parser.parse_args().word.lower()
    found = {
        title: [row for row in rows if word in row.name.lower() or word in " ".join(row.hub_ids).lower()]
        for title, rows in SECTIONS.items()
    }
    if not any(found.values()):
        raise UserError(f"nothing is called {word!r}; without a word, all towers are listed")
    print("Name, millions of parameters, ids on the Hugging Face Hub whose files are in a layout that is read.\n")
    print("\n\n".join(format_section(title, rows) for title, rows in found.items() if rows))


if __name__ == "__main__":
    with exit_on_error():
        main()
