"""The runs of benchmarks/study.py: methods, the parts of the study, and what follows from the search."""

from collections.abc import Iterator
from typing import NamedTuple

SEARCH_SEED = 100
RATES = (4e-3,)  # peak learning rates that the search tries
# Training pairs and noise of the grid. The most informative come first, for a study that is stopped early.
LEVELS = ((20_000, 0.4), (2_000, 0.4), (2_000, 0.0), (2_000, 0.6), (20_000, 0.0), (2_000, 0.2))
SIZES = (20_000, 2_000)  # training pairs of generations and long runs
SEEDS = (0, 1, 2)
GENERATIONS = 3
COMPARED = ("info_nce", "self_distillation_within")  # in long runs


class Method(NamedTuple):
    """An objective, its fixed parameters, and its own parameter with the values that the search tries."""

    objective: str
    fixed: dict
    parameter: str
    values: tuple[float, ...]


BOTH = {"image_image_weight": 0.3, "text_text_weight": 0.3}
METHODS = {
    "info_nce": Method("info_nce", {}, "log_logit_scale", (2.6, 3.9, 1.6)),
    "label_smoothing": Method("label_smoothing", {}, "smoothing", (0.1, 0.3, 0.5)),
    "self_distillation": Method("self_distillation", {}, "teacher_temperature", (0.05, 0.1, 0.2)),
    "self_distillation_within": Method("self_distillation", BOTH, "teacher_temperature", (0.05, 0.1, 0.2)),
    "otter": Method("otter", {}, "sinkhorn_regulariser", (0.08, 0.15, 0.3, 0.6)),
    # The scale is that of the others.
    "sigmoid": Method("sigmoid", {"log_logit_scale": 2.6}, "logit_bias", (-10.0, -5.0, -2.5)),
}


class Run(NamedTuple):
    """The settings in which runs differ."""

    part: str
    method: str
    noise: float = 0.4
    size: int = 20_000  # training pairs
    seed: int = 0
    rate: float = RATES[0]
    value: float | None = None  # of the method's own parameter
    generation: int = 1
    ramp: int | None = None  # steps; None: the quick start's
    probed: bool = False

    @property
    def name(self) -> str:
        """Different for different runs; fit for a folder name."""
        return "-".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in self)


def teacher_of(run: Run) -> Run:
    """The run whose model teaches a later generation."""
    if run.part == "generations" and run.generation == 2:
        return run._replace(part="grid", generation=1, probed=True)
    return run._replace(generation=run.generation - 1)


def search() -> Iterator[Run]:
    """The runs that choose each method's values, judged on the validation split."""
    for name, method in METHODS.items():
        for rate in RATES:
            for value in method.values:
                yield Run("search", name, seed=SEARCH_SEED, rate=rate, value=value)


def grid(found: dict[str, dict]) -> Iterator[Run]:
    """Each method with the values found, at each size and noise, with each seed."""
    for size, noise in LEVELS:
        for seed in SEEDS:
            for name in METHODS:
                yield Run("grid", name, noise, size, seed, **found[name], probed=is_probed(name, noise, size))


def is_probed(name: str, noise: float, size: int) -> bool:
    """Whether a run of the grid is measured while it trains; these runs also teach a next generation."""
    probed = {20_000: ("info_nce", "self_distillation", "self_distillation_within"), 2_000: ("self_distillation",)}
    return noise == 0.4 and name in probed[size]


def generations(found: dict[str, dict]) -> Iterator[Run]:
    """Students of finished runs of the grid, and students of these."""
    best = found["self_distillation"]
    for size in SIZES:
        for generation in range(2, GENERATIONS + 1):
            for seed in SEEDS:
                yield Run("generations", "self_distillation", size=size, seed=seed, **best, generation=generation)


def long(found: dict[str, dict]) -> Iterator[Run]:
    """The compared methods on more pairs."""
    for size in SIZES:
        for seed in SEEDS:
            for name in COMPARED:
                yield Run("long", name, size=size, seed=seed, **found[name])


def early(found: dict[str, dict]) -> Iterator[Run]:
    """Teachers that stop after a quarter of the steps, and their students."""
    best = found["self_distillation"]
    for generation in (1, 2):
        for seed in SEEDS:
            yield Run("early", "self_distillation", 0.4, 2_000, seed, **best, generation=generation, probed=True)


def cold(found: dict[str, dict]) -> Iterator[Run]:
    """Self-distillation with sharper soft labels, with and without a ramp."""
    rate = found["self_distillation"]["rate"]
    for temperature in (0.01, 0.1):
        for ramp in (0, None):
            yield Run("cold", "self_distillation", rate=rate, value=temperature, ramp=ramp, probed=True)


def short() -> Iterator[Run]:
    """A run whose teacher is its own EMA, and one that the first run teaches."""
    for generation in (1, 2):
        yield Run("short", "self_distillation", value=0.1, generation=generation, probed=True)


def best_of_search(lines: list[dict]) -> dict[str, dict]:
    """For each method the learning rate and parameter with the most hits on the validation split."""
    found = {}
    for name in METHODS:
        tried = [line for line in lines if line["part"] == "search" and line["method"] == name]
        if len(tried) == len(RATES) * len(METHODS[name].values):
            best = max(tried, key=lambda line: line["eval/validation/hit@1"])
            found[name] = {"rate": best["rate"], "value": best["value"]}
    return found


def plan_runs(parts: list[str], lines: list[dict]) -> list[Run]:
    """All runs of these parts; those that need the results of the search only once it is complete."""
    without_search = {"search": search, "short": short}
    searched = {"grid": grid, "generations": generations, "long": long, "early": early, "cold": cold}
    runs, found = [], best_of_search(lines)
    for part in parts:
        if part in without_search:
            runs += without_search[part]()
        elif len(found) == len(METHODS):
            runs += searched[part](found)
    return runs
