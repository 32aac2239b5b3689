"""Says what a data source holds.

zslflax data 'shards/{00000..00099}.tar'
zslflax data pairs.csv --picture=pairs.png
"""

import argparse
import json
import logging

from zslflax.cli import exit_on_error, number_from, start_logging
from zslflax.config import default_config
from zslflax.data.sources.base import Source
from zslflax.data.sources.opening import open_source
from zslflax.data.summary import draw_examples, format_summary, summarise_source
from zslflax.errors import UserError
from zslflax.figures import figure_path, write_figure

log = logging.getLogger("zslflax")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("zslflax data", description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="as in the config's data.train or eval.sets.NAME.data")
    parser.add_argument(
        "--split", choices=("train", "test"), help="default: train where there are captions, or else test"
    )
    parser.add_argument(
        "--samples", type=number_from(0), default=1_000, help="samples that are read, 0 for all (default 1000)"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw ten samples into this file, such as samples.png")
    parser.add_argument("--captions-per-line", action="store_true", help="as the config's data.captions_per_line")
    parser.add_argument("--tfds-dir", default="", help="as the config's data.tfds_dir")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    path = args.picture and figure_path(args.picture, "--picture")
    start_logging()
    source, split = open_either(args.source, args.split, args.captions_per_line, args.tfds_dir)
    summary = {"source": args.source, "split": split} | summarise_source(source, args.samples)
    print(
        json.dumps(summary, ensure_ascii=False) if args.json else f"{args.source}, {split}\n{format_summary(summary)}"
    )
    if path:
        drawn = draw_examples(source)
        if drawn is None:
            raise UserError(f"none of ten samples of {args.source} can be read: there is nothing to draw")
        write_figure(drawn, path)
        log.info("%s has ten samples", path)


def open_either(spec: str, split: str | None, captions_per_line: bool, tfds_dir: str) -> tuple[Source, str]:
    """Opens a source for a split; for None, as training data, or else, where that is refused, as a test set.

    Raises:
        UserError: the source cannot be opened; for None, the reason why it is no training data.
    """
    config = default_config().data
    config.captions_per_line, config.tfds_dir = captions_per_line, tfds_dir
    if split:
        return open_source(spec, config, split), split
    try:
        return open_source(spec, config, "train"), "train"
    except UserError as refused:
        try:
            source = open_source(spec, config, "test")
        except UserError:
            raise refused from None
        log.info("a test set, and no training data: %s", refused)
        return source, "test"


if __name__ == "__main__":
    with exit_on_error():
        main()
