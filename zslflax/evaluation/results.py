"""Names measured values by their parts, and formats them for log files and people."""

from typing import NamedTuple

import numpy as np

from zslflax.evaluation.bootstrap import intervals

COLUMNS = ("@1", "@2", "@5", "@10", "@20", "mAP")  # of `format_table`


class Metric(NamedTuple):
    """Identifies a measured value: what was measured, of which images, model and test set.

    Attributes:
        measure: "hit", "hierarchical", "mAP", "image_to_text", "text_to_image", or a count such as "labelled".
        k: of a measure at k; None for the others.
        group: "seen" or "unseen" classes, or "harmonic" for the harmonic mean of the two; "" for all classes.
        task: "synonyms" for classification by the classes' synonyms, or "retrieval"; "" for classification.
        model: "student"; "" for the model that the run ships.
        test_set: its name in `config.eval.sets`; "" where the values of one test set are at hand.
        bound: "low" or "high" end of the 95% interval; "" for the value itself.

    >>> Metric("hit", 1, group="unseen", model="student", test_set="test").name
    'eval/test/student/unseen/hit@1'
    >>> Metric("mAP", bound="low").name
    'mAP/low'
    """

    measure: str
    k: int | None = None
    group: str = ""
    task: str = ""
    model: str = ""
    test_set: str = ""
    bound: str = ""

    @property
    def name(self) -> str:
        """The flat name, as in metrics.jsonl."""
        test_set = f"eval/{self.test_set}" if self.test_set else ""
        parts = (test_set, self.model, self.task, self.group, self.measure_at_k, self.bound)
        return "/".join(filter(None, parts))

    @property
    def measure_at_k(self) -> str:
        return self.measure if self.k is None else f"{self.measure}@{self.k}"


Results = dict[Metric, float]


def flat_names(results: Results) -> dict[str, float]:
    """The same values by flat name.

    >>> flat_names({Metric("hit", 5): 0.5, Metric("labelled"): 12})
    {'hit@5': 0.5, 'labelled': 12}
    """
    return {metric.name: value for metric, value in results.items()}


def with_intervals(means: Results, draws: dict[Metric, np.ndarray]) -> Results:
    """Adds the ends of the 95% intervals to the values, both as `bootstrap` returns them."""
    results = dict(means)
    for metric, (low, high) in intervals(draws).items():
        results |= {metric._replace(bound="low"): low, metric._replace(bound="high"): high}
    return results


def format_table(results: Results) -> str:
    """Formats hits, recalls and mean average precisions in per cent, with one row per test set, model and measure.

    Of the student the table has the measures of whole test sets only, and of no model the harmonic means. Where the
    results have 95% intervals, ± is half of their width.

    >>> print(format_table({Metric("hit", 1, test_set="pets"): 0.5, Metric("mAP", test_set="pets"): 0.25}))
                   @1    mAP
    pets hit@k   50.0   25.0
    """
    rows: dict[tuple[bool, str], dict[str, str]] = {}
    for metric, value in results.items():
        is_part = bool(metric.task or metric.group)
        if metric.bound or metric.group == "harmonic" or (metric.model == "student" and is_part):
            continue
        if metric.k is not None:
            measure, column = metric.measure, f"@{metric.k}"
        elif metric.measure == "mAP":
            measure, column = "hit", "mAP"  # beside the hits, for want of a k
        else:
            continue
        parts = (metric.test_set, metric.model, metric.task, metric.group, f"{measure}@k")
        title = " ".join(filter(None, parts))
        low, high = (results.get(metric._replace(bound=bound)) for bound in ("low", "high"))
        interval = "" if low is None or high is None else f" ±{50 * (high - low):.1f}"
        rows.setdefault((metric.task == "retrieval", title), {})[column] = f"{100 * value:.1f}{interval}"
    columns = [column for column in COLUMNS if any(column in cells for cells in rows.values())]
    width = max((len(title) for _, title in rows), default=0)
    cell_width = max(7, *(2 + len(cell) for cells in rows.values() for cell in cells.values()), 0)
    lines = [" " * width + "".join(f"{column:>{cell_width}}" for column in columns)]
    for is_retrieval, title in sorted(rows, key=lambda row: row[0]):
        cells = rows[is_retrieval, title]
        lines.append(f"{title:<{width}}" + "".join(f"{cells.get(column, ''):>{cell_width}}" for column in columns))
    if any(metric.model == "student" for metric in results):
        lines.append("(student: the model itself; the other rows are of its moving average, which a run ships)")
    return "\n".join(lines)
