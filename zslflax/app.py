"""Serves a page in the browser that classifies images and finds images of a folder by a sentence.

    zslflax app --workdir=runs/demo --images=FOLDER

It answers this machine only unless --host says otherwise.
"""

import argparse
import logging
import socket

from zslflax.cli import add_model_argument, exit_on_error, prepare_inference, start_logging
from zslflax.errors import UserError
from zslflax.files import local_path
from zslflax.inference.predictor import Predictor
from zslflax.inference.test_names import read_test_names

log = logging.getLogger("zslflax")


def main() -> None:
    parser = argparse.ArgumentParser("zslflax app", description=__doc__.partition("\n")[0])
    add_model_argument(parser)
    parser.add_argument("--images", metavar="FOLDER", help="whose images can be searched")
    parser.add_argument("--host", default="127.0.0.1", help="to serve on; default: this machine only")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    from zslflax.page import serve_page  # needs the extra "app"; where it is missing, main ends with the command

    check_port(args.port)
    prepare_inference()
    start_logging()
    folder = args.images and local_path(args.images, "--images").resolve()
    log.info("loading the model")
    predictor = Predictor.restore(args.workdir)
    serve_page(predictor, folder, args.host, args.port, read_test_names(local_path(args.workdir, "--workdir")))


def check_port(port: int) -> None:
    """Raises a UserError if no page can be served at a port, before the model is loaded."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))  # where Gradio tries it
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port={port} cannot be used: {reason}; choose another, from 1024 to 65535") from error


if __name__ == "__main__":
    with exit_on_error():
        main()
