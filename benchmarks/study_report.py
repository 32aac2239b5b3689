"""Makes tables and figures of the results of benchmarks/study.py.

    pip install matplotlib
    python benchmarks/study_report.py runs/study/results.jsonl --figures=docs/study

Prints the tables in Markdown. An interval is the 95% interval of the mean over seeds, by Student's t. Differences are
between runs with the same seed, so that the effect of a seed on all methods cancels.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

BASELINE = "info_nce"
LABELS = {
    "info_nce": "InfoNCE",
    "label_smoothing": "label smoothing",
    "self_distillation": "self-distillation, image-text",
    "self_distillation_within": "self-distillation, with image-image and text-text",
    "otter": "OTTER",
    "sigmoid": "sigmoid",
}
COLOURS = dict(zip(LABELS, ("#57606a", "#9a6700", "#54aeff", "#0550ae", "#116329", "#a40e26"), strict=True))
TEACHER, STUDENT = "eval/test/hit@1", "eval/test/student/hit@1"


def interval(values) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval (NaN for a single value; both for none)."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.sum() if len(values) else np.nan, np.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))


def format_mean(values, sign: bool = False) -> str:
    """Formats a mean with its interval, in per cent or points."""
    if not len(values):
        return "–"
    mean, half = (100 * x for x in interval(values))
    return (f"{mean:+.1f}" if sign else f"{mean:.1f}") + ("" if np.isnan(half) else f" ± {half:.1f}")


def paired_differences(own: dict[int, dict], baseline: dict[int, dict], metric: str = TEACHER) -> list[float]:
    """The differences between lines with the same seed."""
    return [own[seed][metric] - baseline[seed][metric] for seed in sorted({*own} & {*baseline})]


class Results:
    """The lines of results.jsonl, by part, method, noise, size and seed."""

    def __init__(self, path: Path):
        self.lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.cells = defaultdict(dict)
        for line in self.of_part("grid"):
            self.cells[line["method"], line["noise"], line["size"]][line["seed"]] = line

    def of_part(self, part: str) -> list[dict]:
        return [line for line in self.lines if line["part"] == part]

    def by_seed(self, part: str, **fields) -> dict[int, dict]:
        """The lines of a part in which these fields have these values."""
        return {line["seed"]: line for line in self.of_part(part) if fields.items() <= line.items()}

    def values(self, method, noise, size, metric=TEACHER) -> list[float]:
        return [line[metric] for line in self.cells[method, noise, size].values()]

    def gains(self, method, noise, size, metric=TEACHER) -> list[float]:
        """The differences to the baseline's runs with the same seeds."""
        return paired_differences(self.cells[method, noise, size], self.cells[BASELINE, noise, size], metric)

    def levels(self, size: int | None = None) -> list[tuple[int, float]]:
        found = {(s, noise) for (_, noise, s), cell in self.cells.items() if cell and size in (None, s)}
        return sorted(found, key=lambda level: (-level[0], level[1]))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def search_table(results: Results) -> str:
    rows = [
        [
            LABELS[line["method"]],
            f"{line['rate']:g}",
            f"{line['value']:g}",
            f"{100 * line['eval/validation/hit@1']:.1f}",
        ]
        for line in sorted(results.of_part("search"), key=lambda line: list(LABELS).index(line["method"]))
    ]
    return table(["method", "learning rate", "own parameter", "validation hit@1"], rows)


def grid_tables(results: Results, size: int, metric: str = TEACHER) -> str:
    noises = [noise for _, noise in results.levels(size)]
    header = ["method", *(f"noise {noise:g}" for noise in noises)]
    rows = [
        [label, *(format_mean(results.values(m, noise, size, metric)) for noise in noises)]
        for m, label in LABELS.items()
    ]
    gains = []
    for m, label in LABELS.items():
        if m != BASELINE:
            found = [results.gains(m, noise, size, metric) for noise in noises]
            gains.append([label, *(format_mean(values, sign=True) for values in [*found, sum(found, [])])])
    return table(header, rows) + "\n" + table(["difference to InfoNCE, same seeds", *header[1:], "all of them"], gains)


def shipping_table(results: Results) -> str:
    """The teacher's advantage over the student in the runs of the grid."""
    rows = []
    for method, label in LABELS.items():
        lines = [line for (m, _, _), cell in results.cells.items() if m == method for line in cell.values()]
        ahead = [line[TEACHER] - line[STUDENT] for line in lines]
        rows.append(
            [label, f"{len(lines)}", format_mean(ahead, sign=True), f"{100 * np.mean(np.greater(ahead, 0)):.0f}%"]
        )
    return table(["method", "runs", "teacher − student, points", "teacher ahead in"], rows)


def advantage_table(results: Results) -> str:
    """The teacher's advantage over the student during training, in the runs that were measured."""
    ahead = defaultdict(list)
    for line in results.of_part("grid"):
        for point in line["history"]:
            ahead[point["step"]].append(point[TEACHER] - point[STUDENT])
    return table(
        ["step", *map(str, ahead)],
        [["teacher − student, points", *(format_mean(x, sign=True) for x in ahead.values())]],
    )


def generation_table(results: Results) -> str:
    """The student of each generation; the teacher of the first is its own EMA."""
    rows = []
    for size in sorted({line["size"] for line in results.of_part("generations")}, reverse=True):
        first = results.cells["self_distillation", 0.4, size]
        for who, metric in (("student", STUDENT), ("teacher", TEACHER)):
            hits = [line[metric] for line in first.values()]
            rows.append([f"{size:,}", f"1: teacher is its own EMA; the {who}", format_mean(hits), ""])
        for generation in sorted({line["generation"] for line in results.of_part("generations")}):
            own = results.by_seed("generations", generation=generation, size=size)
            hits, gains = [line[TEACHER] for line in own.values()], paired_differences(own, first)
            rows.append(
                [
                    f"{size:,}",
                    f"{generation}: teacher is generation {generation - 1}",
                    format_mean(hits),
                    format_mean(gains, sign=True),
                ]
            )
    return table(["pairs", "generation", "hit@1", "to the first teacher"], rows)


def short_table(results: Results) -> str:
    teachers = {1: "its own EMA", 2: "the first run"}
    rows = [[teachers[line["generation"]], f"{100 * line[TEACHER]:.1f}"] for line in results.of_part("short")]
    return table(["teacher", "hit@1"], rows)


def long_table(results: Results) -> str:
    rows = []
    for size, method in dict.fromkeys((line["size"], line["method"]) for line in results.of_part("long")):
        own, baseline = (results.by_seed("long", size=size, method=name) for name in (method, BASELINE))
        hits, gains = [line[TEACHER] for line in own.values()], paired_differences(own, baseline)
        rows.append([f"{size:,}", LABELS[method], f"{len(own)}", format_mean(hits), format_mean(gains, sign=True)])
    return table(["pairs", "method", "seeds", "hit@1", "difference to InfoNCE"], rows)


def early_table(results: Results) -> str:
    """A first teacher that stopped early, its student, and hard labels and the usual teacher after all steps."""
    cells = {"InfoNCE": results.cells[BASELINE, 0.4, 2_000]}
    cells["teacher is its own EMA"] = results.cells["self_distillation", 0.4, 2_000]
    for generation, name in ((1, "the same after a quarter of the steps"), (2, "teacher is the latter")):
        cells[name] = results.by_seed("early", generation=generation)
    rows = []
    for name, own in cells.items():
        gains = paired_differences(own, cells["InfoNCE"])
        found = [line["probe/mismatched/true_is_likelier"] for line in own.values() if line["probed"]]
        hits = format_mean([line[TEACHER] for line in own.values()])
        rows.append([name, hits, format_mean(gains, sign=True) if name != "InfoNCE" else "", format_mean(found)])
    return table(["2,000 pairs", "hit@1", "to InfoNCE", "own caption likelier than the wrong one, %"], rows)


def cold_table(results: Results) -> str:
    rows = [
        [
            f"{line['value']:g}",
            "none" if line["ramp"] == 0 else "a fifth of the steps",
            f"{100 * line[TEACHER]:.1f}",
            f"{line['history'][0]['probe/captions_in_use']:.0f}",
            f"{line['probe/captions_in_use']:.0f}",
        ]
        for line in sorted(results.of_part("cold"), key=lambda line: (line["value"], line["ramp"] is None))
    ]
    return table(["temperature", "ramp", "hit@1", "captions in use, first evaluation", "at the end"], rows)


def draw_means(axis, places, values: list[list[float]], method: str) -> None:
    """Draws means with their intervals, in per cent or points; lists without values are left out."""
    drawn = [(place, *interval(of)) for place, of in zip(places, values, strict=True) if len(of)]
    places, means, halves = np.reshape(drawn, (-1, 3)).T
    style = {"color": COLOURS[method], "label": LABELS[method], "capsize": 2, "marker": "o", "ms": 4}
    axis.errorbar(places, 100 * means, 100 * halves, **style)


def draw_noise(results: Results, path: Path) -> None:
    """Draws two panels for each size: hit@1 against noise, and the difference to InfoNCE."""
    from matplotlib import pyplot as plt

    sizes = sorted({size for size, _ in results.levels()}, reverse=True)
    figure, axes = plt.subplots(
        len(sizes), 2, figsize=(10, 0.7 + 3.2 * len(sizes)), layout="constrained", sharex=True, squeeze=False
    )
    for size, (left, right) in zip(sizes, axes, strict=True):
        noises = np.array([noise for _, noise in results.levels(size)])
        for i, method in enumerate(LABELS):
            places = noises + 0.006 * (i - 2.5)  # so that the intervals do not overlap
            for axis, values in ((left, results.values), (right, results.gains)):
                if axis is right and method == BASELINE:
                    continue
                draw_means(axis, places, [values(method, noise, size) for noise in noises], method)
        left.set(ylabel="flat hit@1, %", title=f"{size:,} pairs")
        right.set(ylabel="points", title=f"{size:,} pairs: difference to InfoNCE, same seeds")
        right.axhline(0, color=COLOURS[BASELINE], lw=1)
    for axis in axes[-1]:
        axis.set(xlabel="share of captions of another image")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, axes.flat, path)


def draw_sizes(results: Results, path: Path) -> None:
    """Draws the difference to InfoNCE against the training pairs, with a panel for each noise that all sizes have."""
    from matplotlib import pyplot as plt

    noises = sorted({noise for _, noise in results.levels()})
    sizes = sorted({size for size, _ in results.levels()})
    both = [noise for noise in noises if all((size, noise) in results.levels() for size in sizes)]
    if not both:
        return
    figure, axes = plt.subplots(
        1, len(both), figsize=(4.4 * len(both), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, noise in zip(axes[0], both, strict=True):
        for i, method in enumerate(LABELS):
            if method == BASELINE:
                continue
            places = np.arange(len(sizes)) + 0.03 * (i - 3)
            draw_means(axis, places, [results.gains(method, noise, size) for size in sizes], method)
        axis.axhline(0, color=COLOURS[BASELINE], lw=1)
        axis.set(title=f"noise {noise:g}", xlabel="training pairs", xticks=range(len(sizes)))
        axis.set_xticklabels([f"{size:,}" for size in sizes])
    axes[0][0].set_ylabel("difference to InfoNCE, points of hit@1")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(both), frameon=False)
    save_figure(figure, axes[0], path)


def draw_probe(results: Results, path: Path) -> None:
    """Draws the teacher's soft labels of clean and of mismatched pairs during training, as means over seeds.

    There is a row of panels for each size. Nothing is drawn if no run was measured while it trained.
    """
    from matplotlib import pyplot as plt

    runs = defaultdict(list)
    for line in results.of_part("grid"):
        if line["history"]:
            runs[line["size"], line["method"]].append(line["history"])
    if not runs:
        return
    sizes = sorted({size for size, _ in runs}, reverse=True)
    shape = {"figsize": (12, 0.7 + 3 * len(sizes)), "layout": "constrained", "sharex": True, "squeeze": False}
    figure, axes = plt.subplots(len(sizes), 3, **shape)
    for (size, method), histories in runs.items():
        steps, row = [point["step"] for point in histories[0]], axes[sizes.index(size)]
        mean = lambda name, of=histories: np.mean([[point[name] for point in run] for run in of], axis=0)
        style = {"color": COLOURS[method], "marker": "o", "ms": 3}
        row[0].plot(steps, 100 * mean(TEACHER), **style, label=LABELS[method])
        for axis, dashed, solid in (
            (row[1], "probe/mismatched/given", "probe/mismatched/true"),
            (row[2], "probe/mismatched/entropy", "probe/clean/entropy"),
        ):
            axis.plot(steps, mean(solid), **style)
            axis.plot(steps, mean(dashed), **style, ls="--")
    for size, row in zip(sizes, axes, strict=True):
        row[0].set(title=f"{size:,} pairs: hit@1, %")
        row[1].set(title="probability, mismatched pairs:\n– the image's own caption, - - the given one")
        row[2].set(title="entropy of the soft label, nats:\n– clean pairs, - - mismatched ones")
    known = {label: line for row in axes for line, label in zip(*row[0].get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known, loc="outside upper center", ncols=3, frameon=False)
    for axis in axes[-1]:
        axis.set(xlabel="step")
    save_figure(figure, axes.flat, path)


def save_figure(figure, axes, path: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for noise.png, size.png and soft_labels.png")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    print(f"{len(results.lines)} runs\n")
    if results.of_part("short"):
        print(short_table(results))
    if results.of_part("search"):
        print(f"Search\n\n{search_table(results)}")
    for size in sorted({size for size, _ in results.levels()}, reverse=True):
        print(f"hit@1 of the teacher, {size:,} pairs\n\n{grid_tables(results, size)}")
        print(f"hit@1, unseen pairs of colour and shape\n\n{grid_tables(results, size, 'eval/test/unseen/hit@1')}")
    if results.cells:
        print(f"Teacher or student\n\n{shipping_table(results)}\n{advantage_table(results)}")
    if results.of_part("generations"):
        print(f"Generations\n\n{generation_table(results)}")
    if results.of_part("long"):
        print(f"Longer\n\n{long_table(results)}")
    if results.of_part("early"):
        print(f"A teacher that stopped early\n\n{early_table(results)}")
    if results.of_part("cold"):
        print(f"Cold start\n\n{cold_table(results)}")
    if arguments.figures:
        import matplotlib

        matplotlib.use("Agg")
        draw_noise(results, arguments.figures / "noise.png")
        draw_sizes(results, arguments.figures / "size.png")
        draw_probe(results, arguments.figures / "soft_labels.png")


if __name__ == "__main__":
    main()
