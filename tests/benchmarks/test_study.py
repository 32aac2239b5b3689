"""The study of benchmarks/: that its runs are as planned, go on where they were, and are summed up rightly."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(BENCHMARKS)
        import study

        yield study
    sys.modules.pop("study")


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(BENCHMARKS)
        import study_report

        yield study_report
    sys.modules.pop("study_report")


def searched(study, better: dict[str, float]) -> list[dict]:
    """Lines of a search in which the given values of the methods' own parameters did best."""
    lines = [run._asdict() | {"name": run.name} for run in study.search()]
    for line in lines:
        line["eval/validation/hit@1"] = 0.4 if line["value"] == better[line["method"]] else 0.3
    return lines


def test_the_grid_waits_for_the_search_and_takes_the_best(study):
    best = {name: method.values[-1] for name, method in study.METHODS.items()}
    lines = searched(study, best)
    assert {run.part for run in study.plan(["search", "grid"], lines[:-1])} == {"search"}
    runs = [run for run in study.plan(["search", "grid"], lines) if run.part == "grid"]
    assert {run.method: run.value for run in runs} == best
    cells = {(run.method, run.noise, run.size, run.seed) for run in runs}
    assert len(cells) == len(runs) == len(study.METHODS) * len(study.LEVELS) * len(study.SEEDS)
    assert len({run.name for run in runs}) == len(runs)
    longer = study.plan(["long"], lines)
    assert {run.method: run.value for run in longer} == {name: best[name] for name in study.COMPARED}


def test_a_generation_waits_for_the_one_before_and_two_never_take_the_same(study, tmp_path):
    lines = searched(study, {name: method.values[0] for name, method in study.METHODS.items()})
    runs = study.plan(["generations"], lines)
    assert study.take(runs, set(), tmp_path) is None
    grid = {run.name for run in study.plan(["grid"], lines)}
    assert all(study.teacher_of(run).name in grid for run in runs if run.generation == 2)
    for part in ("early", "short"):  # parts that make their own first teacher
        first, second = ({r.name: r for r in study.plan([part], lines) if r.generation == g} for g in (1, 2))
        assert second and {study.teacher_of(run).name for run in second.values()} == {*first}
    first, claim = study.take(runs, grid, tmp_path)
    with claim:
        other, claim = study.take(runs, grid, tmp_path)
    with claim:
        assert first.generation == other.generation == 2 and first != other
        again, claim = study.take(runs, grid, tmp_path)  # the first process has ended
    with claim:
        assert again == first


def test_a_run_is_trained_looked_at_and_teaches_the_next(study, tmp_path, tiny, monkeypatch):
    """Real runs, with the config made small."""

    def small(run, folder, steps, image_size):
        c = config_of(run, folder, steps, image_size)
        c.model, c.batch_size = tiny.model, 16  # the text tower is of random weights, and as frozen as the real one
        c.compilation_cache, c.eval.batch_size = tiny.compilation_cache, 16
        c.data.shapes.train, c.data.shapes.test = 96, 24
        return c

    config_of = study.config_of
    monkeypatch.setattr(study, "config_of", small)
    monkeypatch.setattr(study, "PROBED", 48)
    run = study.Run("grid", "self_distillation", value=0.05, probed=True)
    with monkeypatch.context() as context:
        context.setattr(study.training, "train", lambda *_, **__: False)  # asked to stop
        with pytest.raises(SystemExit):
            study.perform(run, tmp_path, 6, 16, None)
    line, features = study.perform(run, tmp_path, 6, 16, None)
    assert [point["step"] for point in line["history"]] == [1, 2, 3, 4, 5, 6]
    last = line["history"][-1]
    assert 0 <= last["probe/mismatched/true"] <= 1 and 1 <= last["probe/captions_in_use"] <= 48
    following = study.Run("generations", "self_distillation", value=0.05, generation=2)
    taught, _ = study.perform(following, tmp_path, 6, 16, features)
    assert "eval/test/hit@1" in taught and "eval/test/student/hit@1" not in taught  # it has no average of its own


def test_soft_labels_that_know_the_truth_are_seen_to(study, tmp_path, tiny):
    """A model of which each picture's embedding is that of its own caption; and one that says the same of all."""
    tiny.data.shapes.update(train=2_000, noise=0.4)
    probe = study.Probe(tiny)
    assert 0.3 < probe.mismatched.mean() < 0.5
    basis = np.eye(len(probe.true) + 1, dtype=np.float32)
    known = {caption: i for i, caption in enumerate(dict.fromkeys(probe.true))}

    class Knows:
        def encode_text(self, texts):
            return basis[[known.get(text, len(known)) for text in texts]]

        def encode_image(self, images):
            return self.encode_text(probe.true)

    class SaysTheSame(Knows):
        def encode_image(self, images):
            return self.encode_text([probe.true[0]] * len(images))

    seen = probe({"": Knows()})
    assert seen["probe/mismatched/true_is_likelier"] > 0.99 and seen["probe/clean/given"] > 0.5
    assert seen["probe/captions_in_use"] > 100
    assert probe({"": SaysTheSame()})["probe/captions_in_use"] < 20


def test_intervals_are_students(report):
    values = [0.41, 0.44, 0.43]
    mean, half = report.interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_differences_are_of_the_same_seeds(report, tmp_path):
    hits = {("info_nce", 0): 0.30, ("info_nce", 1): 0.40, ("otter", 0): 0.32, ("otter", 1): 0.42, ("otter", 2): 0.9}
    cell = {"part": "grid", "noise": 0.4, "size": 20_000, "history": []}
    lines = [cell | {"method": m, "seed": s, report.TEACHER: hit} for (m, s), hit in hits.items()]
    lines += [line | {"noise": 0.0, report.TEACHER: 0.5} for line in lines]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = report.Results(path)
    assert results.gains("otter", 0.4, 20_000) == pytest.approx([0.02, 0.02])
    assert "| OTTER | +0.0 ± 0.0 | +2.0 ± 0.0 | +1.0 ± 1.8 |" in report.grid_tables(results, 20_000)
