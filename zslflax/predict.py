"""Classifies images with a trained model.

zslflax predict cat.jpg FOLDER --workdir=runs/demo --class-names="a cat,a dog"
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from zslflax.cli import add_model_argument, exit_on_error, number_from, prepare_inference
from zslflax.errors import UserError
from zslflax.figures import figure_path, prediction_grid, text_bars, write_figure
from zslflax.inference.classifier import Classifier
from zslflax.inference.image_input import expand_folders, read_image
from zslflax.inference.predictor import Predictor
from zslflax.inference.prompts import read_class_names, read_templates
from zslflax.inference.test_names import read_test_names
from zslflax.inference.top_k import top_k_or_all
from zslflax.models.import_weights.locate import locate

CHUNK = 64  # images that are in memory at once, unless they are drawn
SHOWN_NAMES = 5  # of a list of class names, on standard error


def main() -> None:
    args = parse_arguments()
    prepare_inference()
    predictor = Predictor.restore(args.workdir, allow_urls=args.allow_urls)
    templates = read_templates(args.templates) if args.templates else None
    class_names = read_class_names(args.class_names) if args.class_names else own_class_names(predictor, args.workdir)
    if args.class_names and (repeated := [name for name, count in Counter(class_names).items() if count > 1]):
        print(f"zslflax: --class-names has names more than once: {shorten_list(repeated)}", file=sys.stderr)
    answered, broken = classify_files(predictor, args.images, class_names, templates, args.top, args.png, args.json)
    if broken and not answered:
        sys.exit("zslflax: none of the images could be read")
    if broken:
        sys.exit(f"zslflax: {broken} of the images could not be read; the others are answered")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser("zslflax predict", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="a file, or a folder: the images below it")
    add_model_argument(parser)
    parser.add_argument("--class-names", help='"a cat,a dog", or a file with one a line; default: the model\'s own')
    parser.add_argument(
        "--templates", help='a prompt template, such as "a photo of a {}.", or a file of them; default: the run\'s'
    )
    parser.add_argument("--top", type=number_from(1), default=5, help="class names per image (default: 5)")
    parser.add_argument("--png", metavar="FILE", help="draw the answers into this file instead of printing them")
    parser.add_argument("--json", action="store_true", help="print a JSON object per image, with probabilities")
    parser.add_argument("--allow-urls", action="store_true", help="an IMAGE may be an http(s) address, and is fetched")
    parser.add_argument("--export", help=argparse.SUPPRESS)  # what it was in 0.1.0
    args = parser.parse_args()
    if args.export is not None:
        parser.error(f"--export is a command of its own now: zslflax export {args.export} --workdir={args.workdir}")
    if not args.images:
        parser.error("give images")
    if args.png:
        args.png = figure_path(args.png, "--png")
    return args


def own_class_names(predictor: Predictor, model: str) -> list[str]:
    """The classes of a classifier, or the class names of a test set of the model's run. Standard error says which.

    Args:
        predictor: the model.
        model: the folder or the Hub id from which it was restored.

    Raises:
        UserError: the model has no class names of its own.
    """
    if isinstance(predictor, Classifier):
        names, origin = list(predictor.class_names), "classes of the classifier"
    else:
        names, origin = read_test_names(locate(model)), "class names of the model's test set"
    if not names:
        raise UserError(
            f'{model} has no class names of its own; give --class-names="a cat,a dog", or a file with one a line'
        )
    print(f"zslflax: no --class-names: the {len(names)} {origin} are taken ({shorten_list(names)})", file=sys.stderr)
    return names


def shorten_list(names: Sequence[str]) -> str:
    """The first names, with commas between them."""
    return ", ".join([*names[:SHOWN_NAMES], *(["…"] if len(names) > SHOWN_NAMES else [])])


def classify_files(
    predictor: Predictor,
    paths: Sequence[str],
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    top_k: int,
    png: Path | None,
    as_json: bool,
) -> tuple[int, int]:
    """Classifies image files, and prints the best class names of each or draws them into the file `png`.

    Returns:
        The numbers of images that were classified, and that could not be read. Each of the latter is reported.
    """
    class_emb = predictor.class_embeddings(class_names, templates)
    remaining, drawn, answered, broken = expand_folders(paths), [], 0, 0
    while chunk := list(itertools.islice(remaining, CHUNK)):
        images, readable = read_images(chunk, predictor.allow_urls)
        answered += len(readable)
        broken += len(chunk) - len(readable)
        image_emb = predictor.encode_image(images)
        scores, ids = top_k_or_all(image_emb, class_emb, top_k)
        probabilities = predictor.probabilities(image_emb, class_emb, scores) if as_json else scores
        for image, path, row in zip(images, readable, zip(ids, scores, probabilities)):
            answer = [(class_names[i], float(score), float(probability)) for i, score, probability in zip(*row)]
            if png:
                drawn.append((image, [(name, score, False) for name, score, _ in answer], [Path(path).name]))
            if as_json:
                print(format_json(path, answer))
            elif not png:
                print("\n".join([str(path), *text_bars([(name, score) for name, score, _ in answer])]))
        sys.stdout.flush()
    if png and drawn:
        write_figure(prediction_grid(*zip(*drawn)), png)
        print(f"zslflax: wrote {png}", file=sys.stderr)
    return answered, broken


def format_json(path: str | Path, answer: Sequence[tuple[str, float, float]]) -> str:
    """Returns a line of JSON for an image and its class names, cosine similarities and probabilities.

    >>> format_json("cat.jpg", [("a cat", 0.3, 0.9)])
    '{"image": "cat.jpg", "classes": [{"name": "a cat", "cosine": 0.3, "probability": 0.9}]}'
    """
    classes = [{"name": name, "cosine": round(score, 6), "probability": round(p, 6)} for name, score, p in answer]
    return json.dumps({"image": str(path), "classes": classes}, ensure_ascii=False)


def read_images(paths: Iterable[str | Path], allow_urls: bool) -> tuple[list[np.ndarray], list[str | Path]]:
    """Reads images, and reports on standard error those that cannot be read. Returns images and their paths."""
    images, readable = [], []
    for path in paths:
        try:
            images.append(read_image(path, allow_urls))
        except UserError as error:
            print(f"zslflax: left out: {error}", file=sys.stderr)
        else:
            readable.append(path)
    return images, readable


if __name__ == "__main__":
    with exit_on_error():
        main()
