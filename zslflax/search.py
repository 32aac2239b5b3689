"""Finds the images that fit a sentence best.

zslflax search FOLDER --query="something purple" --query="a blue fish" --workdir=runs/demo
"""

import argparse
import json
import sys

from zslflax.cli import add_model_argument, exit_on_error, number_from, prepare_inference
from zslflax.errors import UserError
from zslflax.figures import text_bars
from zslflax.inference.embed_files import embed_files
from zslflax.inference.image_input import expand_folders
from zslflax.inference.predictor import Predictor
from zslflax.inference.prompts import check_queries


def main() -> None:
    parser = argparse.ArgumentParser("zslflax search", description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder: the images below it")
    parser.add_argument("--query", action="append", required=True, help="a sentence; several give several answers")
    add_model_argument(parser)
    parser.add_argument("--top", type=number_from(1), default=5, help="images per query (default: 5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per query")
    parser.add_argument("--allow-urls", action="store_true", help="an IMAGE may be an http(s) address, and is fetched")
    args = parser.parse_args()
    check_queries(args.query)  # before the images are embedded
    prepare_inference()
    predictor = Predictor.restore(args.workdir, allow_urls=args.allow_urls)
    errors: list[UserError] = []
    paths, image_emb = embed_files(predictor, expand_folders(args.images), errors.append)
    for error in errors:
        print(f"zslflax: left out: {error}", file=sys.stderr)
    for query, answer in zip(args.query, predictor.search(args.query, image_emb, top_k=args.top)):
        found = [(str(paths[i]), score) for i, score in answer]
        if args.json:
            images = [{"image": path, "cosine": round(score, 6)} for path, score in found]
            print(json.dumps({"query": query, "images": images}, ensure_ascii=False))
        elif found:
            print("\n".join([query, *text_bars(found)]))
    if errors and not paths:
        sys.exit("zslflax: none of the images could be read")
    if errors:
        sys.exit(f"zslflax: {len(errors)} of the images could not be read; the others were searched")


if __name__ == "__main__":
    with exit_on_error():
        main()
