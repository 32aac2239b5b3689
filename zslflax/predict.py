"""Classifies images with a trained model, or exports the model.

python -m zslflax.predict cat.jpg dog.jpg --workdir=runs/demo --class-names="a cat,a dog"
python -m zslflax.predict --workdir=runs/demo --export=FOLDER
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from zslflax.cli import exit_on_error
from zslflax.figures import prediction_grid, text_bars
from zslflax.inference.image_input import read_image
from zslflax.inference.predictor import Predictor
from zslflax.inference.prompts import read_class_names, read_templates


def main() -> None:
    args = parse_arguments()
    predictor = Predictor.restore(args.workdir)
    if args.export:
        predictor.export(args.export)
    if args.images:
        templates = read_templates(args.templates) if args.templates else None
        classify_files(predictor, args.images, read_class_names(args.class_names), templates, args.top, args.png)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; images and class names need each other."""
    parser = argparse.ArgumentParser("python -m zslflax.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--workdir", required=True, help="a training run, an exported folder or a Hub id")
    parser.add_argument("--class-names", help='"a cat,a dog", or a file with one class name per line')
    parser.add_argument(
        "--templates", help='a prompt template, such as "a photo of a {}.", or a file of them; default: the run\'s'
    )
    parser.add_argument("--top", type=int, default=5, help="class names per image (default: 5)")
    parser.add_argument("--png", metavar="FILE", help="draw the answers into this file instead of printing them")
    parser.add_argument("--export", metavar="FOLDER", help="write the model into this new folder")
    args = parser.parse_args()
    if bool(args.images) != bool(args.class_names) or not (args.images or args.export):
        parser.error("give images and --class-names, or --export, or all of them")
    return args


def classify_files(
    predictor: Predictor,
    paths: Sequence[str],
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    top_k: int,
    png: str | None,
) -> None:
    """Classifies image files, and prints the best class names of each or draws them into the file `png`."""
    images = [read_image(path) for path in paths]
    answers = predictor.classify(images, class_names, templates=templates, top_k=top_k)
    if png:
        predictions = [[(name, score, False) for name, score in answer] for answer in answers]
        prediction_grid(images, predictions, [[Path(path).name] for path in paths]).save(png)
    else:
        for path, answer in zip(paths, answers):
            print("\n".join([path, *text_bars(answer)]))


if __name__ == "__main__":
    with exit_on_error():
        main()
