"""Makes tables and the figure of the results of benchmarks/small_classifiers.py.

    pip install matplotlib
    python benchmarks/small_classifiers_report.py --figure=docs/study/small_classifiers.png

Prints the tables in Markdown. An accuracy is the mean over classes. Over several seeds, an interval is the 95% interval
of the mean by Student's t, and differences are between runs with the same seed. A single seed has an interval over the
classes, whose differences are paired: it says nothing of how another seed would differ.
"""

import argparse
from pathlib import Path

import numpy as np
from small_classifiers import CHOICES, FEW_SHOT, GENERATIONS, MOBILENET, NANO, RESULTS, STUDENTS, TEACHER
from study_report import Results, format_mean, interval, paired_differences, save_figure, table

LABELS = {
    "labels": "true labels",
    "soft": "soft labels",
    "reasons": "soft labels and reasons",
    "hard": "hard labels",
    "plain": "without rotations",
    "rotations": "generation 0",
    "generation 1": "generation 1",
}
TOWERS = {NANO: "ResNet, 0.3 M, 32 pixels", MOBILENET: "MobileNetV2, pretrained, frozen, 112 pixels"}
OUTPUTS = ("features", "logits")
COLOURS = {NANO: "#0550ae", MOBILENET: "#9a6700", "1-shot": "#54aeff", "5-shot": "#0550ae"}
Lines = dict[int, dict]  # by seed


def class_accuracies(lines: Lines) -> np.ndarray:
    """The accuracy of each class, as a mean over seeds: [c]."""
    return np.mean([np.divide(line["right"], line["images"]) for line in lines.values()], axis=0)


def accuracies(lines: Lines) -> list[float]:
    """The accuracy, a mean over classes, of each seed; of a single seed those of the classes."""
    if len(lines) == 1:
        return class_accuracies(lines).tolist()
    return [float(class_accuracies({0: line}).mean()) for line in lines.values()]


def difference(own: Lines, baseline: Lines) -> str:
    """The mean difference of accuracies in points, paired by seed, or by class where there is one seed in common."""
    seeds = sorted({*own} & {*baseline})
    pairs = [accuracies({seed: lines[seed] for seed in seeds}) for lines in (own, baseline)] if seeds else ([], [])
    return format_mean(np.subtract(*pairs).tolist(), sign=True)


def distil_table(results: Results, tower: str) -> str:
    """The students of one tower, by what they learn from."""
    students = {method: results.by_seed("distil", method=method, tower=tower) for method in STUDENTS}
    rows = []
    for method, lines in students.items():
        if lines:
            used = np.mean([line["used"] for line in lines.values()])
            compared = [difference(lines, students[other]) if method != other else "" for other in ("soft", "labels")]
            rows.append([LABELS[method], f"{len(lines)}", format_mean(accuracies(lines)), *compared, f"{used:.0f}"])
    return table([TOWERS[tower], "seeds", "accuracy, %", "to soft labels", "to true labels", "classes named"], rows)


def teacher_table(results: Results) -> str:
    """The teacher's accuracy on new photographs and on those that its students are trained on."""
    rows = [
        [format_mean(accuracies({0: line})), f"{100 * line['train/accuracy']:.1f}", f"{line['used']}"]
        for line in results.of_part("teacher")
    ]
    return table(["teacher: accuracy, %", "on the students' training photographs", "classes named"], rows)


def classes_table(results: Results, names: list[str], shown: int = 5) -> str:
    """The best and the worst classes of the teacher and of students with soft labels."""
    rows = []
    models = {"teacher": results.by_seed("teacher")}
    models |= {TOWERS[tower]: results.by_seed("distil", method="soft", tower=tower) for tower in TOWERS}
    for label, lines in models.items():
        if lines:
            values = class_accuracies(lines)
            order = np.argsort(-values, kind="stable")
            listed = lambda part, values=values: ", ".join(f"{names[i]} {100 * values[i]:.0f}" for i in part)
            below = f"{np.mean(values < 0.1) * len(values):.0f}"
            rows.append([label, listed(order[:shown]), listed(order[-shown:]), below])
    return table(["accuracy, %", "best classes", "worst classes", "classes below 10%"], rows)


def choices_table(results: Results) -> str:
    """Students with other values, beside those with the config's and the same seed."""
    rows = []
    for method, fields in CHOICES.items():
        lines = results.by_seed("choices", method=method)
        compared = "reasons" if "sentences" in fields else "soft"
        for line in lines.values():
            tower = line["tower"]
            baseline = results.by_seed("distil", method=compared, tower=tower)
            cells = [format_mean(accuracies(lines)), LABELS[compared], difference(lines, baseline), f"{line['used']}"]
            rows.append([TOWERS[tower], method, *cells])
    header = ["one seed", "changed", "accuracy, %", "compared with", "difference", "classes named"]
    return table(header, rows)


def speed_table(results: Results) -> str:
    """Sizes and times of the last measurement."""
    rows = []
    for line in results.of_part("speed")[-1:]:
        for tower, label in ({TEACHER: "teacher, EfficientNet-Lite0, 112 pixels"} | TOWERS).items():
            if f"{tower}/MB" in line:
                values = [line[f"{tower}/{what}"] for what in ("MB", "onnx MB", "ms", "onnx ms")]
                rows.append([label, *(f"{value:.1f}" for value in values)])
    return table(["model", "exported, MB", "ONNX, MB", "ms an image", "ms an image, ONNX Runtime"], rows)


def few_shot_table(results: Results, classifier: str = "logistic", part: str = "few_shot") -> str:
    """5-way accuracies of new classes, and the differences to generation 0 with the same seeds."""
    rows, header = [], ["tower", "output", "seeds", "1-shot, %", "to generation 0", "5-shot, %", "to generation 0"]
    for line in results.of_part("teacher"):
        for output, label in (("features", "EfficientNet-Lite0, pretrained"), ("embedding", "the teacher's")):
            found = [few_shot_interval({0: line}, f"{output}/{shots}-shot/{classifier}") for shots in (1, 5)]
            cells = [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in found]
            rows.append([label, output, "1", cells[0], "", cells[1], ""])
    baseline = results.by_seed(part, method="rotations")
    for method in GENERATIONS:
        lines = results.by_seed(part, method=method)
        for output in OUTPUTS if lines else ():
            cells = []
            for shots in (1, 5):
                metric = f"{output}/{shots}-shot/{classifier}"
                mean, half = (100 * value for value in few_shot_interval(lines, metric))
                cells.append(f"{mean:.1f} ± {half:.1f}")
                gains = paired_differences(lines, baseline, metric)
                cells.append("" if method == "rotations" else format_mean(gains, sign=True))
            rows.append([LABELS[method], output, f"{len(lines)}", *cells])
    return table(header, rows)


def cost_table(results: Results) -> str:
    """Seconds of CPU that training took."""
    rows = []
    for part in ("distil", *FEW_SHOT):
        for method in STUDENTS | GENERATIONS:
            for tower in TOWERS:
                lines = results.by_seed(part, method=method, tower=tower).values()
                if lines:
                    steps = {f"{line['steps']:,} × {line['batch_size']}" for line in lines}
                    cpu = np.median([line["train_cpu"] for line in lines])
                    rows.append([LABELS[method], TOWERS[tower], ", ".join(steps), f"{cpu:.0f}"])
    return table(["run", "tower", "steps × images", "CPU seconds of training, median"], rows)


def draw(results: Results, path: Path) -> None:
    """Two panels: students by what they learn from, and few-shot accuracies by how the tower was trained."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    measured = [tower for tower in TOWERS if results.by_seed("distil", tower=tower)]
    for i, tower in enumerate(measured):
        cells = [results.by_seed("distil", method=method, tower=tower) for method in STUDENTS]
        place = i if len(measured) > 1 else 0.5
        draw_bars(left, [interval(accuracies(lines)) if lines else None for lines in cells], place, tower)
    for line in results.of_part("teacher"):
        draw_level(left, float(class_accuracies({0: line}).mean()), "the teacher", "#57606a")
    left.set(ylabel="accuracy, 160 classes, %")
    left.set_xticks(range(len(STUDENTS)), [LABELS[method].replace(" and ", "\nand ") for method in STUDENTS])
    left.set_title("Students, by what they learn from", fontsize=10)
    for i, shots in enumerate(("1-shot", "5-shot")):
        metric = f"features/{shots}/logistic"
        cells = [results.by_seed("few_shot", method=method) for method in GENERATIONS]
        draw_bars(right, [few_shot_interval(lines, metric) if lines else None for lines in cells], i, shots)
        for line in results.of_part("teacher"):
            draw_level(right, line[metric], f"pretrained Lite0, {shots}", COLOURS[shots])
    draw_level(right, 0.2, "chance", "#57606a")
    right.set(ylabel="5-way accuracy, %")
    right.set_xticks(range(len(GENERATIONS)), [LABELS[method] for method in GENERATIONS])
    right.set_title("New classes, by how a ResNet of 0.3 M is trained", fontsize=10)
    for axis in (left, right):
        axis.set_xlim(-0.6, len(axis.get_xticks()) - 0.2)
        axis.set_ylim(top=axis.get_ylim()[1] + 3)
    left.set_ylim(top=left.get_ylim()[1] + 12)  # room for the legend
    left.legend(frameon=False, fontsize=8, loc="upper left")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.68))
    save_figure(figure, (left, right), path)


def few_shot_interval(lines: Lines, metric: str) -> tuple[float, float]:
    """The mean and half of its interval over seeds, or over episodes where there is one seed."""
    if len(lines) == 1:
        (line,) = lines.values()
        return line[metric], (line[f"{metric}/high"] - line[f"{metric}/low"]) / 2
    return interval([line[metric] for line in lines.values()])


def draw_bars(axis, cells: list[tuple[float, float] | None], i: float, name: str) -> None:
    """Draws the first (0), second (1) or only (0.5) bar at each place, in %.

    Args:
        axis: of matplotlib.
        cells: by place, a mean and half of its interval; None for no bar.
        i: which bar.
        name: of the bars, a tower or a number of shots.
    """
    drawn = [(place, *cell) for place, cell in enumerate(cells) if cell is not None]
    if drawn:
        places, means, halves = np.reshape(drawn, (-1, 3)).T
        style = {"color": COLOURS[name], "label": TOWERS.get(name, name), "capsize": 3, "ecolor": "#24292f"}
        axis.bar(places + 0.4 * i - 0.2, 100 * means, 0.36, yerr=100 * halves, **style)


def draw_level(axis, height: float, name: str, colour: str) -> None:
    """Draws a dashed line with a name at its right end, in %."""
    axis.axhline(100 * height, color=colour, ls="--", lw=1)
    axis.annotate(name, (1, 100 * height), (0, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--figure", type=Path, help="where the figure is written, such as docs/study/x.png")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    minutes = sum(line["cpu_seconds"] for line in results.lines) / 60
    print(f"{len(results.lines)} runs, {minutes:.0f} minutes of one core\n")
    print(f"Teacher\n\n{teacher_table(results)}")
    for tower in TOWERS:
        print(f"Students\n\n{distil_table(results, tower)}")
    names = results.of_part("teacher")[0]["names"]
    print(f"Classes\n\n{classes_table(results, names)}")
    print(f"Other values\n\n{choices_table(results)}")
    print(f"Size and speed\n\n{speed_table(results)}")
    for classifier in ("logistic", "centroid"):
        print(f"New classes, {classifier}\n\n{few_shot_table(results, classifier)}")
    print(f"New classes, more steps\n\n{few_shot_table(results, part='longer')}")
    print(f"Cost\n\n{cost_table(results)}")
    if arguments.figure:
        import matplotlib

        matplotlib.use("Agg")
        draw(results, arguments.figure)


if __name__ == "__main__":
    main()
