"""The runs of benchmarks/study_photos.py: methods, search, and what follows from the search."""

from collections.abc import Iterator
from typing import NamedTuple

from study_plan import Method

SEARCH_SEED = 1_000  # of the search's parameters, order and wrong sentences
ALL, FEW = 24_000, 4_000  # pairs
PASSES = {ALL: (6, 3, 12), FEW: (8, 4, 16)}  # that the search tries, and once half or twice if an end is the best
ACROSS = {"image_image_weight": 0.0, "text_text_weight": 0.0, "remove_diagonal": False}  # image-text similarity alone
WITHIN = {"image_image_weight": 0.5, "text_text_weight": 0.5, "remove_diagonal": True}
METHODS = {  # the first value is that with which the passes are searched
    "info_nce": Method("info_nce", {}, "log_logit_scale", (3.9, 3.2, 4.6)),
    "label_smoothing": Method("label_smoothing", {}, "smoothing", (0.1, 0.2, 0.4)),
    "self_distillation": Method("self_distillation", ACROSS, "teacher_temperature", (0.01, 0.03, 0.1)),
    "self_distillation_within": Method("self_distillation", WITHIN, "teacher_temperature", (0.05, 0.02, 0.1)),
    "otter": Method("otter", {}, "sinkhorn_regulariser", (0.15, 0.07, 0.3)),
    "sigmoid": Method("sigmoid", {}, "logit_bias", (-5.0, -10.0, -2.5)),
}

VALUES_AT = (0.4, ALL)  # noise and pairs at which values are searched, and passes between those above
COMPARED = ("info_nce", "self_distillation", "self_distillation_within", "sigmoid")
# Noise and pairs of the grid with its seeds, the most informative first.
LEVELS = (
    (0.4, ALL, 5),
    (0.0, ALL, 3),
    (0.4, FEW, 3),
    (0.6, ALL, 3),
    (0.2, ALL, 3),
    (0.0, FEW, 3),
    (0.6, FEW, 3),
    (0.2, FEW, 3),
)
REPEATED = 3  # seeds of all that is not in the grid
CLEAN_SIZES = (8_000, 12_000, 16_000)
BASELINE = "info_nce"
TEACHERS = ("self_distillation", "sigmoid")  # whose finished models teach
SCORERS = ("self_distillation",)  # whose finished models score the pairs
FILTERED = (0.1, 0.2, 0.4)  # shares of the pairs that the noise tool leaves out; training is measured at the last two
RATE = 1e-3  # peak learning rate, the same for all methods
OTHER_RATES = ((3e-4, 1.0), (3e-4, 2.0), (3e-3, 0.5))  # other rates, and by what the best passes are multiplied


class Run(NamedTuple):
    """The settings in which runs differ."""

    part: str
    method: str
    noise: float
    size: int  # training pairs
    seed: int
    passes: float
    value: float  # of the method's own parameter
    teacher: str = "ema"  # or the name of the run whose finished model teaches
    rate: float = RATE
    kept: str = ""  # "NAME SHARE": the pairs that are left when the lowest share by the run's scores is left out

    @property
    def name(self) -> str:
        """Different for different runs; fit for a folder name."""
        described = "-".join(f"{value:g}" if isinstance(value, float) else f"{value}" for value in self[:7])
        taught = "" if self.teacher == "ema" else f"-taught-{self.teacher.split('-')[1]}"
        rate = "" if self.rate == RATE else f"-rate-{self.rate:g}"
        scored, _, share = self.kept.partition(" ")
        return described + taught + rate + (f"-kept-{scored.split('-')[1]}-{share}" if share else "")

    @property
    def held_out(self) -> bool:
        """Whether it is judged on training photographs that are held out."""
        return self.part in ("search", "rates")

    @property
    def scored(self) -> bool:
        """Whether its belief in the training pairs is measured at the end, and its scores of them are kept."""
        compared = self.part == "grid" and self.method in COMPARED and (self.noise, self.size) == (0.4, ALL)
        return compared and self.seed < REPEATED

    @property
    def probed(self) -> bool:
        """Whether its belief in the training pairs is measured while it trains, too."""
        return self.scored and self.seed < 2


def tried_in_search(lines: list[dict], name: str, noise: float, size: int) -> dict[tuple[float, float], float]:
    """hit@1 on the held-out photographs by (passes, value of the method's parameter)."""
    fields = {"part": "search", "method": name, "noise": noise, "size": size}
    return {(line["passes"], line["value"]): line["hit@1"] for line in lines if fields.items() <= line.items()}


def plan_search(lines: list[dict], name: str, noise: float, size: int) -> tuple[list[Run], dict | None]:
    """The next runs of a method's search, and what it found once there are none.

    First the passes, with the parameter's first value; then, if the fewest or most passes are the best, half or twice
    as many. At `VALUES_AT`, then the other values at the best passes, and then 2/3 and 4/3 of the passes. Elsewhere the
    value is the one found there.
    """
    tried, values = tried_in_search(lines, name, noise, size), METHODS[name].values
    ends = min(PASSES[size]) / 2, max(PASSES[size]) * 2
    coarse = {key: hit for key, hit in tried.items() if key[0] in (*PASSES[size], *ends)}
    if (noise, size) != VALUES_AT:
        values = (plan_search(lines, name, *VALUES_AT)[1]["value"],)
    missing = lambda settings: [
        Run("search", name, noise, size, SEARCH_SEED, float(passes), value)
        for passes, value in settings
        if (passes, value) not in tried
    ]
    if runs := missing([(passes, values[0]) for passes in PASSES[size]]):
        return runs, None
    best = max(PASSES[size], key=lambda passes: tried[passes, values[0]])
    beyond = {min(PASSES[size]): best / 2, max(PASSES[size]): best * 2}.get(best)
    if beyond and (runs := missing([(beyond, values[0])])):
        return runs, None
    best = max((passes for passes, value in coarse if value == values[0]), key=lambda passes: tried[passes, values[0]])
    if runs := missing([(best, value) for value in values[1:]]):
        return runs, None
    passes, value = max(coarse, key=coarse.__getitem__)
    if (noise, size) == VALUES_AT and (runs := missing([(passes * 2 / 3, value), (passes * 4 / 3, value)])):
        return runs, None
    passes, value = max(tried, key=tried.__getitem__)
    return [], {"passes": passes, "value": value}


def plan_runs(lines: list[dict]) -> Iterator[Run]:
    """All runs that can be planned, the most informative first."""
    found = {}
    for noise, size, seeds in LEVELS:
        for name in METHODS:
            runs, found[name, noise, size] = plan_search(lines, name, noise, size)
            yield from runs
        if any(found[name, noise, size] is None for name in METHODS):
            return
        for seed in range(seeds):
            for name in METHODS:
                yield Run("grid", name, noise, size, seed, **found[name, noise, size])
        if (noise, size) == (0.4, FEW):
            yield from further_runs(found)


def further_runs(found: dict) -> Iterator[Run]:
    """Clean sets of other sizes, training on what the noise tool keeps, generations, and other learning rates."""
    best = {name: found[name, 0.4, ALL] for name in METHODS}
    for seed in range(REPEATED):
        for size in CLEAN_SIZES:
            yield Run("clean", BASELINE, 0.0, size, seed, **found[BASELINE, 0.0, ALL])
        for name in SCORERS:
            scored = Run("grid", name, 0.4, ALL, seed, **best[name]).name
            for share in FILTERED[1:]:
                yield Run("kept", BASELINE, 0.4, ALL, seed, **best[BASELINE], kept=f"{scored} {share}")
        for name in TEACHERS:
            first = Run("grid", name, 0.4, ALL, seed, **best[name])
            run = Run("generations", "self_distillation", 0.4, ALL, seed, **best["self_distillation"])
            yield run._replace(teacher=first.name)
    for name in (BASELINE, *TEACHERS):
        passes, value = best[name]["passes"], best[name]["value"]
        for rate, factor in OTHER_RATES:
            yield Run("rates", name, 0.4, ALL, SEARCH_SEED, factor * passes, value, rate=rate)
