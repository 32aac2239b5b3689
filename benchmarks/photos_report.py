"""Makes tables and the figure of the results of benchmarks/study_photos.py.

    pip install matplotlib
    python benchmarks/photos_report.py --figure=docs/study/photos.png

Prints the tables in Markdown. Intervals and differences are those of benchmarks/study_report.py.
"""

import argparse
from pathlib import Path

import numpy as np
from photos_plan import (
    ALL,
    CLEAN_SIZES,
    COMPARED,
    FEW,
    FILTERED,
    LEVELS,
    METHODS,
    RATE,
    SCORERS,
    TEACHERS,
    VALUES_AT,
)
from study_report import (
    BASELINE,
    COLOURS,
    LABELS,
    STUDENT,
    TEACHER,
    Results,
    draw_means,
    format_mean,
    grid_tables,
    interval,
    paired_differences,
    save_figure,
    shipping_table,
    table,
)

RESULTS = Path(__file__).parent / "results" / "photos.jsonl"
ALONE = "alone/hit@1"  # of the names without captions, with these alone as candidates
PARAMETERS = {
    "log_logit_scale": "initial log-scale",
    "smoothing": "ε",
    "teacher_temperature": "τ",
    "sinkhorn_regulariser": "λ",
    "logit_bias": "initial bias",
}


def searched(results: Results, method: str, noise: float, size: int) -> list[dict]:
    """The runs of a method's search at a noise and a number of pairs."""
    fields = {"method": method, "noise": noise, "size": size}
    return [line for line in results.of_part("search") if fields.items() <= line.items()]


def search_table(results: Results, noise: float, size: int) -> str:
    """hit@1 on the held-out photographs; what was found is bold."""
    rows = []
    for name, method in METHODS.items():
        if lines := searched(results, name, noise, size):
            best = max(lines, key=lambda line: line["hit@1"])
            cells = []
            order = lambda line, first=method.values[0]: (line["value"] != first, line["value"], line["passes"])
            for line in sorted(lines, key=order):
                cell = f"{line['value']:g}, {line['passes']:g} passes: {100 * line['hit@1']:.1f}"
                cells.append(f"**{cell}**" if line is best else cell)
            rows.append([LABELS[name], PARAMETERS[method.parameter], "; ".join(cells)])
    return table(["method", "parameter", "its value, passes: hit@1, %"], rows)


def differences_to_clean(results: Results) -> str:
    """Clean sets of several sizes, and which size of them noisy pairs are worth."""
    rows, curve = [], clean_curve(results)
    for size, values in curve.items():
        rows.append([f"InfoNCE, {size:,} clean pairs", format_mean(values), f"{size:,}"])
    for name in METHODS:
        values = results.values(name, 0.4, ALL)
        if values:
            rows.append(
                [f"{LABELS[name]}, 24,000 pairs at noise 0.4", format_mean(values), worth(curve, np.mean(values))]
            )
    return table(["pairs", "hit@1", "clean pairs for InfoNCE to do as well"], rows)


def clean_curve(results: Results) -> dict[int, list[float]]:
    """hit@1 of InfoNCE on clean sets, by size."""
    curve = {FEW: results.values(BASELINE, 0.0, FEW)}
    for size in CLEAN_SIZES:
        curve[size] = [line[TEACHER] for line in results.by_seed("clean", size=size).values()]
    curve[ALL] = results.values(BASELINE, 0.0, ALL)
    return {size: values for size, values in curve.items() if values}


def worth(curve: dict[int, list[float]], hit: float) -> str:
    """The size of a clean set on which InfoNCE reaches a hit@1, linear in the logarithm of the size between sizes."""
    if not curve:
        return "–"
    means = [float(np.mean(values)) for values in curve.values()]
    if not means[0] <= hit <= means[-1]:
        return f"fewer than {min(curve):,}" if hit < means[0] else f"more than {max(curve):,}"
    return f"{round(float(np.exp(np.interp(hit, means, np.log(list(curve))))), -2):,.0f}"


def belief_table(results: Results, metric: str) -> str:
    """How well a quantity tells right from wrong training pairs during training: its AUC, in %."""
    rows = []
    for name in COMPARED:
        histories = [line["history"] for line in results.cells[name, 0.4, ALL].values() if line["history"]]
        if histories:
            points = [[history[i][metric] for history in histories] for i in range(len(histories[0]))]
            rows.append([LABELS[name], *map(format_mean, points)])
    return table(["method", "a quarter of the steps", "half", "three quarters", "the end"], rows)


def noise_tool_table(results: Results) -> str:
    """Precision and recall of the wrong sentences among the pairs with the lowest scores."""
    rows = []
    for name in COMPARED:
        lines = [line for line in results.cells[name, 0.4, ALL].values() if "auc/belief" in line]
        for share in FILTERED if lines else ():
            found = [format_mean([line[f"noise/{share}/{what}"] for line in lines]) for what in ("precision", "recall")]
            rows.append([LABELS[name], f"{100 * share:.0f}%", *found])
    return table(
        ["model that scores", "share with the lowest scores", "wrong among them, %", "of all wrong ones, %"], rows
    )


def rates_table(results: Results) -> str:
    """hit@1 on the held-out photographs at other learning rates, beside what the search found."""
    rows = []
    for name in (BASELINE, *TEACHERS):
        tried = [line for line in results.of_part("rates") if line["method"] == name]
        if tried:
            found = max(searched(results, name, *VALUES_AT), key=lambda line: line["hit@1"])
            for line in [found, *tried]:
                rows.append(
                    [LABELS[name], f"{line.get('rate', RATE):g}", f"{line['passes']:g}", f"{100 * line['hit@1']:.1f}"]
                )
    return table(["method", "learning rate", "passes", "hit@1, %"], rows)


def compare_table(results: Results, rows: dict[str, dict[int, dict]]) -> str:
    """hit@1 and the differences to InfoNCE and to self-distillation on all pairs."""
    base, distilled = (results.cells[name, 0.4, ALL] for name in (BASELINE, "self_distillation"))
    own = [
        [
            label,
            f"{len(lines)}",
            format_mean([line[TEACHER] for line in lines.values()]),
            *(format_mean(paired_differences(lines, other), sign=True) for other in (base, distilled)),
        ]
        for label, lines in rows.items()
        if lines
    ]
    header = ["24,000 pairs at noise 0.4", "seeds", "hit@1", "to InfoNCE on all", "to self-distillation on all"]
    return table(header, own)


def generations_and_kept(results: Results) -> dict[str, dict[int, dict]]:
    rows = {LABELS[name]: results.cells[name, 0.4, ALL] for name in (BASELINE, "self_distillation")}
    for teacher in TEACHERS:
        lines = [line for line in results.of_part("generations") if line["teacher"].split("-")[1] == teacher]
        label = f"self-distillation, taught by a finished model of {LABELS[teacher]}"
        rows[label] = {line["seed"]: line for line in lines}
    for name in SCORERS:
        for share in FILTERED[1:]:
            lines = [line for line in results.of_part("kept") if line["kept"].split()[1] == f"{share}"]
            label = f"InfoNCE, without the {100 * share:.0f}% with the lowest scores by a model of {LABELS[name]}"
            rows[label] = {line["seed"]: line for line in lines if line["kept"].split("-")[1] == name}
    return rows


def draw(results: Results, path: Path) -> None:
    """Two panels: the difference to InfoNCE against noise, and what noisy pairs are worth in clean ones."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    noises = np.array([noise for _, noise in results.levels(ALL)])
    for i, name in enumerate(name for name in LABELS if name != BASELINE):
        draw_means(left, noises + 0.008 * (i - 2), [results.gains(name, noise, ALL) for noise in noises], name)
    left.axhline(0, color=COLOURS[BASELINE], lw=1)
    left.set(xlabel="share of wrong sentences", ylabel="points of hit@1", xticks=noises)
    left.set_title("24,000 photographs: difference to InfoNCE, same seeds", fontsize=10)
    left.set_ylim(top=left.get_ylim()[1] + 2.5)  # room for the legend
    left.legend(frameon=False, fontsize=8)
    curve = clean_curve(results)
    draw_means(right, np.array(list(curve)), list(curve.values()), BASELINE)
    for name in (BASELINE, *TEACHERS):
        mean, half = interval(results.values(name, 0.4, ALL))
        right.axhline(100 * mean, color=COLOURS[name], ls="--", lw=1.2)
        right.axhspan(100 * (mean - half), 100 * (mean + half), color=COLOURS[name], alpha=0.12, lw=0)
        right.text(FEW, 100 * mean + 0.1, f"{LABELS[name]}, 24,000 at noise 0.4", fontsize=8)
    right.set(
        xlabel="right pairs that InfoNCE is trained on", ylabel="hit@1 of 200 names, %", xlim=(FEW - 500, ALL + 500)
    )
    right.set_xticks(list(curve), [f"{size:,}" for size in curve])
    right.set_title("What noisy pairs are worth in right ones", fontsize=10)
    save_figure(figure, (left, right), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--figure", type=Path, help="where the figure is written, such as docs/study/photos.png")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    minutes = sum(line["cpu_seconds"] for line in results.lines) / 60
    print(f"{len(results.lines)} runs, {minutes:.0f} minutes of one core\n")
    for noise, size, _ in LEVELS:
        print(f"Search, {size:,} pairs at noise {noise:g}\n\n{search_table(results, noise, size)}")
    for size in sorted({size for size, _ in results.levels()}, reverse=True):
        for title, metric in (
            ("hit@1", TEACHER),
            ("hit@5", "eval/test/hit@5"),
            ("hit@1 of the student", STUDENT),
            ("hit@1 of the names without captions alone", ALONE),
            ("hit@1 of the names without captions among all", "eval/test/unseen/hit@1"),
        ):
            print(f"{title}, {size:,} pairs\n\n{grid_tables(results, size, metric)}")
    print(f"Other learning rates, 24,000 pairs at noise 0.4\n\n{rates_table(results)}")
    print(f"Teacher or student\n\n{shipping_table(results)}")
    print(f"What noisy pairs are worth\n\n{differences_to_clean(results)}")
    for metric in ("auc/belief", "auc/similarity"):
        print(f"Wrong pairs found, {metric}\n\n{belief_table(results, metric)}")
    print(f"Noise tool\n\n{noise_tool_table(results)}")
    print(f"Generations and kept pairs\n\n{compare_table(results, generations_and_kept(results))}")
    if arguments.figure:
        import matplotlib

        matplotlib.use("Agg")
        draw(results, arguments.figure)


if __name__ == "__main__":
    main()
