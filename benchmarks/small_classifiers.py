"""Small classifiers on photographs: what label-free distillation and few-shot training reach. No GPU is needed.

    python benchmarks/small_classifiers.py --data=FOLDER --image-weights=FOLDER    # everything; again: continues it
    python benchmarks/small_classifiers_report.py                                  # tables and the figure

The data are those of benchmarks/study_photos.py. `--image-weights` has a folder `efficientnet_lite0` and a folder
`mobilenet_v2`, each with safetensors. Each run is `zslflax.training.loop.train` on one of the shipped configs with the
changes made here, and adds a line to the results. The parts:

    teacher     configs/photos.py: the sigmoid loss on all photographs with their own sentences. It is measured on the
                test photographs of the classes with sentences, and in episodes of the classes without
    distil      configs/distil_prompts.py: students of that teacher, which see no sentences and no labels; and the same
                students on true labels (`distil_prompts.py:labels`)
    few_shot    configs/skd.py on the classes with sentences: without rotations, with them (generation 0), and
                generation 1; in episodes of the other classes
    longer      the same with more steps, one seed
    choices     other values of the students' fields, one seed each
    speed       sizes, and milliseconds for an image by one process on this computer's CPU

No value is chosen by these results: fields that are not set here are those of the configs.
"""

import argparse
import runpy
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from json_lines import append_line, read_lines
from photos_labelled import LabelledPhotos

from zslflax import distributed
from zslflax.cli import start_logging
from zslflax.config import eval_set
from zslflax.config_checks import validate
from zslflax.data.preprocess import record_image
from zslflax.evaluation.few_shot_sets import embed_views, measure_few_shot
from zslflax.inference.onnx_export import IMAGE_TOWER, import_onnx_libraries
from zslflax.inference.predictor import Predictor
from zslflax.training import loop
from zslflax.training.frozen_features import open_kept_features

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).parent / "results" / "small_classifiers.jsonl"
SEEDS = (0, 1, 2)
NANO, MOBILENET, TEACHER = "resnet_nano", "mobilenet_v2", "efficientnet_lite0"
PIXELS = {NANO: 32, MOBILENET: 112}
STEPS = {NANO: 400, MOBILENET: 300}  # of 128 photographs: 2.1 and 1.6 passes
FEW_SHOT = {"few_shot": 300, "longer": 2_000}  # steps of 64 photographs, by part: 0.8 and 5.3 passes
EPISODES = {"ways": 5, "shots": (1, 5), "queries": 15, "episodes": 600}
VIEWS = 5  # augmented views of a labelled image of an episode
TIMED = 200  # images, one at a time

STUDENTS: dict[str, dict[str, Any]] = {  # fields of the objective
    "soft": {},
    "labels": {},
    "reasons": {"sentences": "sentences.json"},
    "hard": {"hard_labels": True},
}
CHOICES: dict[str, dict[str, Any]] = {
    "no fairness term": {"fairness_weight": 0.0},
    "confidence 0.5": {"min_confidence": 0.5},
    "alpha 0.25": {"alpha": 0.25, "sentences": "sentences.json"},
    "alpha 0.75": {"alpha": 0.75, "sentences": "sentences.json"},
}
GENERATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # the argument of configs/skd.py, and fields of the objective
    "plain": ("0", {"rotation_weight": 0.0}),
    "rotations": ("0", {}),
    "generation 1": ("1", {}),
}


class Run(NamedTuple):
    """The settings in which runs differ."""

    part: str
    method: str
    tower: str = NANO
    seed: int = 0

    @property
    def name(self) -> str:
        """Different for different runs; fit for a folder name."""
        return "-".join(map(str, self)).replace(" ", "_")


def plan_runs() -> Iterator[Run]:
    """All runs, the most informative first, for a study that is stopped early. Each comes after those it needs."""
    yield Run("teacher", "sigmoid", TEACHER)
    for seed in SEEDS:
        for method in STUDENTS:
            yield Run("distil", method, NANO, seed)
        for method in GENERATIONS:
            yield Run("few_shot", method, NANO, seed)
        for method in ("soft", "labels", "hard"):  # reasons are learnt by the tower, which is frozen
            yield Run("distil", method, MOBILENET, seed)
        if seed == 0:
            yield Run("speed", "one image", "all")
    for method in GENERATIONS:
        yield Run("longer", method)
    for method, fields in CHOICES.items():  # a frozen tower does not learn from reasons
        yield Run("choices", method, NANO if "sentences" in fields else MOBILENET)


def make_config(run: Run, arguments: argparse.Namespace, photos: LabelledPhotos):
    """The shipped config of a run's part with the settings of the run."""
    get_config = lambda name, argument="": runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](argument)
    shards, labelled = (str(arguments.data / "train-*.tar"),), (str(photos.folder / "train.tar"),)
    names = str(photos.folder / "names.txt")
    if run.part == "teacher":
        c = get_config("photos")
        c.model.image.pretrained = str(arguments.image_weights / TEACHER)
        c.data.train = shards
    elif run.part in FEW_SHOT:
        generation, fields = GENERATIONS[run.method]
        c = get_config("skd", generation)
        c.objective.update(fields)
        c.data.train = labelled
        if generation == "1":
            c.teacher.workdir = c.init_from = str(arguments.folder / run._replace(method="rotations").name)
    else:
        c = get_config("distil_prompts", "labels" if run.method == "labels" else "")
        c.objective.update((STUDENTS | CHOICES)[run.method])
        if c.objective.sentences:
            c.objective.sentences = str(arguments.data / c.objective.sentences)
        c.data.train = labelled if run.method == "labels" else shards
        if run.method != "labels":
            c.teacher.workdir = str(arguments.folder / Run("teacher", "sigmoid", TEACHER).name)
        if run.tower == MOBILENET:
            c.model.image.pretrained = str(arguments.image_weights / MOBILENET)
            c.freeze = (("image/tower", -1),)  # a step needs a third of the time
    if run.part != "teacher":
        c.steps = FEW_SHOT[run.part] if run.part in FEW_SHOT else STEPS[run.tower]
        c.model.class_names = (names,)
        c.model.image.name, c.model.image.size = run.tower, PIXELS[run.tower]
    c.features.folder = "" if run.part in FEW_SHOT else str(arguments.features)
    c.name, c.seed, c.data.threads = run.name, run.seed, 1
    c.eval.every, c.checkpoint.every = c.steps, max(1, c.steps // 4)
    c.eval.sets = {"test": eval_set(data=str(photos.folder / "test.tar"), class_names=names)}
    validate(c)
    return c


def measure_classes(predictor: Predictor, image_emb: np.ndarray, photos: LabelledPhotos) -> dict[str, Any]:
    """The accuracy on the test photographs of the known classes, of each class too.

    Args:
        predictor: the model.
        image_emb: its embeddings of the test photographs.
        photos: with their classes.

    Returns:
        `accuracy`; `right`, how many photographs of each class are named right, `images`, of how many; `used`, how many
        classes are named at all.
    """
    answers = best_classes(predictor, image_emb, photos)
    right, count = answers == photos.labels, len(photos.names)
    return {
        "accuracy": round(float(right.mean()), 5),
        "right": np.bincount(photos.labels[right], minlength=count).tolist(),
        "images": np.bincount(photos.labels, minlength=count).tolist(),
        "used": len(np.unique(answers)),
    }


def measure_teacher(predictor: Predictor, config: Any, photos: LabelledPhotos) -> dict[str, Any]:
    """The same of the teacher, whose features are kept; and of the photographs that students are trained on."""
    features_of = open_kept_features(predictor, config)
    embed = lambda source: predictor.project_image(features_of(source)(np.arange(len(source)))[0])
    right = best_classes(predictor, embed(photos.train), photos) == photos.train_labels
    line = measure_classes(predictor, embed(photos.test), photos)
    return line | {"train/accuracy": round(float(right.mean()), 5), "names": photos.names}


def best_classes(predictor: Predictor, image_emb: np.ndarray, photos: LabelledPhotos) -> np.ndarray:
    """The class that a model finds nearest to each image: int64 [n]."""
    return np.argmax(image_emb @ predictor.class_embeddings(photos.names).T, axis=1)


def measure_episodes(predictor: Predictor, photos: LabelledPhotos) -> dict[str, float]:
    """Few-shot accuracies on the other classes, as `zslflax few-shot` measures them; the same episodes for all runs."""
    measured = measure_few_shot(embed_views(predictor, photos.novel, VIEWS), **EPISODES)
    return {name: round(value, 5) for name, value in measured.items()}


def train_and_measure(run: Run, arguments: argparse.Namespace, photos: LabelledPhotos) -> dict[str, Any]:
    """Performs a run of any part but "speed"; a run that was stopped continues."""
    config, workdir = make_config(run, arguments, photos), arguments.folder / run.name
    started, cpu = time.time(), time.process_time()
    if not loop.train(config, workdir):
        raise SystemExit(0)
    trained = {"train_seconds": round(time.time() - started, 1), "train_cpu": round(time.process_time() - cpu, 1)}
    last = read_lines(workdir / "metrics.jsonl")[-1]
    line = {"steps": config.steps, "batch_size": config.batch_size} | trained
    line |= {key: round(last[key], 5) for key in ("train/loss", "eval/test/hit@1") if key in last}
    predictor = Predictor.restore(workdir)
    if run.part == "teacher":
        line |= measure_teacher(predictor, config, photos)
    elif run.part not in FEW_SHOT:
        images = [record_image(photos.test[i]) for i in range(len(photos.test))]
        line |= measure_classes(predictor, predictor.encode_image(images), photos)
    if run.part == "teacher" or run.part in FEW_SHOT:
        line |= measure_episodes(predictor, photos)
    return line


def measure_speed(arguments: argparse.Namespace, photos: LabelledPhotos) -> dict[str, Any]:
    """Sizes and times of one exported model of each tower that is trained; images come one by one and in turn.

    Each model gets the same JPEG files, as `Predictor.encode_image` takes them: decoding, resizing and the tower; and
    its ONNX file the crops alone. The medians do not depend on which model was measured when the computer was busy.
    """
    runs = {TEACHER: Run("teacher", "sigmoid", TEACHER), NANO: Run("distil", "soft")}
    runs |= {MOBILENET: Run("distil", "soft", MOBILENET)}
    done = {line["name"] for line in read_lines(arguments.results)}
    runs = {tower: run for tower, run in runs.items() if run.name in done}
    files = [photos.test[i]["image"] for i in np.linspace(0, len(photos.test) - 1, TIMED).astype(int)]
    functions: dict[tuple[str, str], Callable[[bytes], Any]] = {}
    line: dict[str, Any] = {}
    for tower, run in runs.items():
        folder = arguments.folder / "exported" / tower
        if not (folder / IMAGE_TOWER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            Predictor.restore(arguments.folder / run.name).export(folder, onnx=True)
        predictor, session = Predictor.restore(folder), import_onnx_libraries()[1](folder / IMAGE_TOWER)
        size = lambda pattern, folder=folder: round(sum(f.stat().st_size for f in folder.rglob(pattern)) / 1e6, 2)
        line |= {f"{tower}/MB": size("*.safetensors"), f"{tower}/onnx MB": size(f"{IMAGE_TOWER}*")}
        functions[tower, "ms"] = predictor.encode_image
        functions[tower, "onnx ms"] = lambda crop, session=session: session.run(None, {"image": crop})
    crops = {
        tower: [Predictor.restore(arguments.folder / "exported" / tower).preprocess(f)[None] for f in files]
        for tower in runs
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    for i, file in enumerate(files):
        for (tower, kind), function in functions.items():
            started = time.perf_counter()
            function(file if kind == "ms" else crops[tower][i])
            times[tower, kind].append(1_000 * (time.perf_counter() - started))
    medians = {"/".join(key): round(statistics.median(values[10:]), 2) for key, values in times.items()}
    return line | medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the photographs and sentences")
    parser.add_argument("--image-weights", type=Path, required=True, help="folder of the folders of both towers")
    parser.add_argument("--folder", type=Path, default=Path("runs/small_classifiers"), help="of the runs")
    parser.add_argument("--features", type=Path, default=Path("~/.cache/zslflax/features"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run begins")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.absolute()
    start_logging()
    until = time.time() + 60 * arguments.minutes
    distributed.initialize("~/.cache/zslflax/xla")
    photos = LabelledPhotos(arguments.data, arguments.folder / "data")
    for run in plan_runs():
        if time.time() > until:
            return
        if run.name not in {line["name"] for line in read_lines(arguments.results)}:
            perform_run(run, arguments, photos)


def perform_run(run: Run, arguments: argparse.Namespace, photos: LabelledPhotos) -> None:
    """Performs a run and adds its line to the results."""
    started, cpu = time.time(), time.process_time()
    measured = measure_speed(arguments, photos) if run.part == "speed" else train_and_measure(run, arguments, photos)
    line = run._asdict() | {"name": run.name} | measured
    line |= {"seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    append_line(arguments.results, line | {"jax": jax.__version__})
    shown = line.get("accuracy", line.get("features/5-shot/logistic"))
    print(f"{run.name}: {shown}, {line['seconds']} s, {line['cpu_seconds']} s of CPU", flush=True)
    jax.clear_caches()


if __name__ == "__main__":
    main()
