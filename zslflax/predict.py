"""Names images with a trained model, or exports it.

python -m zslflax.predict cat.jpg dog.jpg --workdir=runs/demo --names="a cat,a dog"
python -m zslflax.predict --workdir=runs/demo --export=FOLDER
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from zslflax import figures
from zslflax.cli import exit_on_error
from zslflax.inference.predictor import Predictor, read_image
from zslflax.inference.prompts import read_names, read_templates


def main() -> None:
    parser = argparse.ArgumentParser("python -m zslflax.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--workdir", required=True, help="of a training run; or an exported folder, or a Hub id")
    parser.add_argument("--names", help='"a cat,a dog", or a file with one name a line')
    parser.add_argument("--templates", help='prompts, "a photo of a {}.", or a file of them; default: the run\'s')
    parser.add_argument("--top", type=int, default=5, help="names for each image")
    parser.add_argument("--png", metavar="FILE", help="draw the answers there instead of in the terminal")
    parser.add_argument("--export", metavar="FOLDER", help="write the model there, to be used without the run")
    args = parser.parse_args()
    if bool(args.images) != bool(args.names) or not (args.images or args.export):
        parser.error("give images and --names, or --export, or all of them")
    predictor = Predictor.restore(args.workdir)
    if args.export:
        predictor.export(args.export)
    if not args.images:
        return
    shown = [read_image(path) for path in args.images]
    templates = read_templates(args.templates) if args.templates else None
    answers = predictor.classify(shown, read_names(args.names), templates=templates, top_k=args.top)
    if args.png:
        rows = [[(name, score, False) for name, score in answer] for answer in answers]
        figures.prediction_grid(shown, rows, [[Path(path).name] for path in args.images]).save(args.png)
    for path, answer in zip(args.images, [] if args.png else answers):
        print("\n".join([path, *bars(answer)]))


def bars(rows: Sequence[tuple[str, float]], width: int = 30) -> list[str]:
    """Lines of names, bars and scores."""
    room = max(len(name) for name, _ in rows)
    lengths = [round(8 * width * length) for length in figures.bar_lengths([score for _, score in rows])]
    drawn = ["█" * (length // 8) + " ▏▎▍▌▋▊▉"[length % 8].strip() for length in lengths]
    return [f"  {name:<{room}}  {bar:<{width}}  {score:.3f}" for (name, score), bar in zip(rows, drawn)]


if __name__ == "__main__":
    with exit_on_error():
        main()
