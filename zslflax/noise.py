"""Analyses how noisy a dataset's pairing of images and captions is, as a trained model sees it.

zslflax noise --workdir=runs/demo --data=shapes
zslflax train --config=… --config.data.exclude=runs/demo/noise/noise.csv
"""

import argparse
import json
from pathlib import Path

from zslflax.cli import add_model_argument, exit_on_error, prepare_inference, start_logging
from zslflax.evaluation.caption_noise import analyse_source
from zslflax.files import local_path
from zslflax.inference.predictor import Predictor
from zslflax.training.frozen_features import open_kept_features


def main() -> None:
    parser = argparse.ArgumentParser("zslflax noise", description=__doc__.partition("\n")[0])
    add_model_argument(parser)
    parser.add_argument("--data", required=True, help="a source of pairs, as in the config's data.train")
    parser.add_argument("--worst", type=float, default=0.1, help="share of the pairs in noise.csv (default 0.1)")
    parser.add_argument(
        "--to", help="folder of noise.json, noise.csv and noise.png; default: MODEL/noise, runs/NAME/noise for a Hub id"
    )
    args = parser.parse_args()
    prepare_inference()
    if not 0.0 < args.worst < 1.0:
        parser.error(f"--worst is {args.worst}, expected a share between 0 and 1")
    start_logging()
    folder = local_path(args.to or own_folder(args.workdir) / "noise", "--to")
    predictor = Predictor.restore(args.workdir)
    features_of = open_kept_features(predictor, predictor.config)
    summary = analyse_source(predictor, args.data, args.worst, folder, features_of)
    print(json.dumps(summary, ensure_ascii=False))


def own_folder(model: str) -> Path:
    """The folder of a model: its own, or runs/NAME for one of the Hub.

    A folder called like the id of a model on the Hub would hide that model.
    """
    folder = local_path(model, "--workdir")
    return folder if folder.is_dir() else Path("runs") / folder.name


if __name__ == "__main__":
    with exit_on_error():
        main()
