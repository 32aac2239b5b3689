"""Writes a model into a new folder, and uploads it to the Hugging Face Hub if asked to.

zslflax export FOLDER --workdir=runs/demo [--onnx] [--push=USER/NAME --license=apache-2.0 --data="what it learnt from"]
"""

import argparse
import json

from zslflax.cli import add_model_argument, exit_on_error, prepare_inference, start_logging
from zslflax.files import local_path
from zslflax.inference.hub import check_repository, push_folder
from zslflax.inference.model_card import read_facts
from zslflax.inference.predictor import Predictor
from zslflax.inference.test_names import read_test_names, write_test_names


def main() -> None:
    args = parse_arguments()
    start_logging()
    prepare_inference()
    predictor = Predictor.restore(args.workdir, step=args.step)
    workdir = local_path(args.workdir, "--workdir")
    facts = read_facts(workdir, predictor.step, args.license, args.data)
    predictor.export(args.folder, onnx=args.onnx, facts=facts)
    if names := read_test_names(workdir):
        write_test_names(args.folder, {"test": names})
    result = {"folder": str(args.folder), "step": predictor.step}
    if args.push:
        result["url"] = push_folder(args.folder, args.push, args.private)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print("\n".join([f"the model is in {args.folder}", *([f"and at {result['url']}"] if args.push else [])]))


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; everything that can be refused at once is."""
    parser = argparse.ArgumentParser("zslflax export", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")
    add_model_argument(parser)
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument("--onnx", action="store_true", help='write both towers as ONNX too (the extra "onnx")')
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is private")
    parser.add_argument("--license", default="", help="for the model card, an id of the Hub such as apache-2.0")
    parser.add_argument("--data", default="", help="for the model card, what the training data is")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    args.folder = local_path(args.folder, "FOLDER")
    if args.push:
        check_repository(args.push)
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
