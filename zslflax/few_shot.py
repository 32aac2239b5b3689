"""Measures how well a model's image tower tells new classes apart, by a few labelled images of each.

zslflax few-shot --workdir=runs/demo --data=folder:birds
zslflax few-shot --workdir=runs/skd --data=folder:images --classes=novel.txt --shots=1,5
"""

import argparse
import json
import logging

from zslflax.cli import add_model_argument, exit_on_error, number_from, prepare_inference, start_logging
from zslflax.evaluation.few_shot_sets import (
    embed_views,
    format_metrics,
    measure_few_shot,
    measure_whole_set,
    open_labelled,
)
from zslflax.inference.predictor import Predictor
from zslflax.inference.prompts import read_class_names

log = logging.getLogger("zslflax")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser("zslflax few-shot", description=__doc__.partition("\n")[0])
    add_model_argument(parser)
    parser.add_argument("--step", type=int, help="of a checkpoint of the run; default: the newest")
    parser.add_argument("--use", default="teacher", choices=("teacher", "student"), help="default: teacher, if any")
    parser.add_argument("--data", required=True, help="labelled images, as in the config's eval.sets.NAME.data")
    parser.add_argument("--classes", help="a file with the classes to use, one a line, or a,b,…; default: all")
    parser.add_argument("--class-names", help="the names of the labels, where the data has numbers alone")
    parser.add_argument("--train", help="labelled images of the same classes, for nearest neighbours and linear probe")
    parser.add_argument("--ways", type=number_from(2), default=5, help="classes in an episode (default: 5)")
    parser.add_argument("--shots", default="1,5", help="labelled images of each class (default: 1,5)")
    parser.add_argument("--queries", type=number_from(1), default=15, help="test images of each class (default: 15)")
    parser.add_argument("--episodes", type=number_from(2), default=600, help="default: 600")
    parser.add_argument(
        "--views", type=number_from(0), default=5, help="augmented views of each shot; 0: none (default: 5)"
    )
    parser.add_argument("--seed", type=number_from(0), default=0, help="of the episodes and of the views (default: 0)")
    args = parser.parse_args()
    try:
        args.shots = [number_from(1)(k) for k in args.shots.split(",")]
    except argparse.ArgumentTypeError:
        parser.error(f"--shots is {args.shots!r}, expected numbers such as 1,5")
    return args


def main() -> None:
    args = parse_arguments()
    prepare_inference()
    start_logging()
    class_names = read_class_names(args.class_names) if args.class_names else None
    kept = read_class_names(args.classes) if args.classes else None
    source = open_labelled(args.data, class_names, kept)
    train = open_labelled(args.train, class_names, kept or source.classes) if args.train else None
    predictor = Predictor.restore(args.workdir, step=args.step, use=args.use)
    log.info("embedding %d images, each in %d views", len(source), 1 + args.views)
    images = embed_views(predictor, source, args.views, args.seed)
    log.info("fitting classifiers in %d episodes for each of %s shots", args.episodes, args.shots)
    metrics = measure_few_shot(
        images, shots=args.shots, ways=args.ways, queries=args.queries, episodes=args.episodes, seed=args.seed
    )
    if train is not None:
        metrics |= measure_whole_set(embed_views(predictor, train, 0), images)
    log.info(
        "step %d of %s, %d images of %d classes; accuracy in %%, with 95%% intervals\n%s",
        predictor.step,
        args.workdir,
        len(images.labels),
        len(set(images.labels.tolist())),
        format_metrics(metrics),
    )
    print(json.dumps(metrics))


if __name__ == "__main__":
    with exit_on_error():
        main()
