"""Classifies images with a trained model, or exports the model.

python -m zslflax.predict cat.jpg FOLDER --workdir=runs/demo --class-names="a cat,a dog"
python -m zslflax.predict --workdir=runs/demo --export=FOLDER
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from zslflax.cli import exit_on_error
from zslflax.errors import UserError
from zslflax.figures import prediction_grid, text_bars
from zslflax.files import local_path, storage_errors
from zslflax.inference.image_input import expand_folders, read_image
from zslflax.inference.predictor import Predictor
from zslflax.inference.prompts import read_class_names, read_templates
from zslflax.inference.top_k import top_k_or_all

CHUNK = 64  # images that are in memory at once, unless they are drawn


def main() -> None:
    args = parse_arguments()
    predictor = Predictor.restore(args.workdir)
    if args.export:
        predictor.export(args.export)
    if args.images:
        templates = read_templates(args.templates) if args.templates else None
        class_names = read_class_names(args.class_names)
        broken = classify_files(predictor, args.images, class_names, templates, args.top, args.png)
        if broken:
            sys.exit(f"zslflax: {broken} of the images could not be read; the others are answered")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; images and class names need each other."""
    parser = argparse.ArgumentParser("python -m zslflax.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="a file, or a folder: the images below it")
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
    for option in ("png", "export"):
        if getattr(args, option):
            setattr(args, option, local_path(getattr(args, option), f"--{option}"))
    return args


def classify_files(
    predictor: Predictor,
    paths: Sequence[str],
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    top_k: int,
    png: Path | None,
) -> int:
    """Classifies image files, and prints the best class names of each or draws them into the file `png`.

    Returns:
        The number of images that could not be read. Each is reported, and the others are classified.
    """
    class_emb = predictor.class_embeddings(class_names, templates)
    remaining, drawn, broken = expand_folders(paths), [], 0
    while chunk := list(itertools.islice(remaining, CHUNK)):
        images, readable = read_images(chunk)
        broken += len(chunk) - len(readable)
        scores, ids = top_k_or_all(predictor.encode_image(images), class_emb, top_k)
        for image, path, row in zip(images, readable, zip(ids, scores)):
            answer = [(class_names[i], float(score)) for i, score in zip(*row)]
            if png:
                drawn.append((image, [(name, score, False) for name, score in answer], [path.name]))
            else:
                print("\n".join([str(path), *text_bars(answer)]))
        sys.stdout.flush()
    if png and drawn:
        with storage_errors(png):
            prediction_grid(*zip(*drawn)).save(png)
    return broken


def read_images(paths: Iterable[Path]) -> tuple[list[np.ndarray], list[Path]]:
    """Reads images, and reports on standard error those that cannot be read. Returns images and their paths."""
    images, readable = [], []
    for path in paths:
        try:
            images.append(read_image(path))
        except UserError as error:
            print(f"zslflax: left out: {error}", file=sys.stderr)
        else:
            readable.append(path)
    return images, readable


if __name__ == "__main__":
    with exit_on_error():
        main()
