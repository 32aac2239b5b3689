"""Serves a page in the browser that classifies images and finds images of a folder by a sentence.

    python -m zslflax.app --workdir=runs/demo --images=FOLDER

It answers this machine only unless --host says otherwise.
"""

import argparse

from zslflax.cli import exit_on_error, start_logging
from zslflax.files import local_path
from zslflax.inference.predictor import Predictor
from zslflax.page import serve_page


def main() -> None:
    parser = argparse.ArgumentParser("python -m zslflax.app", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="of a training run; or an exported folder, or a Hub id")
    parser.add_argument("--images", metavar="FOLDER", help="whose images can be searched")
    parser.add_argument("--host", default="127.0.0.1", help="to serve on; default: this machine only")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    start_logging()
    folder = args.images and local_path(args.images, "--images").resolve()
    serve_page(Predictor.restore(args.workdir), folder, args.host, args.port)


if __name__ == "__main__":
    with exit_on_error():
        main()
