"""The study in benchmarks/: the plan of its runs, resuming, soft label measurements, and the report."""

import json

import numpy as np
import pytest
from scipy import stats

from tests.testing.benchmarks import imported


@pytest.fixture(scope="module")
def study():
    with imported("study") as (study,):
        yield study


@pytest.fixture(scope="module")
def plan():
    with imported("study_plan") as (study_plan,):
        yield study_plan


@pytest.fixture(scope="module")
def report():
    with imported("study_report") as (study_report,):
        yield study_report


def searched(plan, better: dict[str, float]) -> list[dict]:
    """Lines of a search in which the given values of the methods' own parameters are best."""
    lines = [run._asdict() | {"name": run.name} for run in plan.search()]
    for line in lines:
        line["eval/validation/hit@1"] = 0.4 if line["value"] == better[line["method"]] else 0.3
    return lines


def test_the_grid_waits_for_the_search_and_uses_its_best_values(plan):
    best = {name: method.values[-1] for name, method in plan.METHODS.items()}
    lines = searched(plan, best)
    assert {run.part for run in plan.plan_runs(["search", "grid"], lines[:-1])} == {"search"}
    runs = [run for run in plan.plan_runs(["search", "grid"], lines) if run.part == "grid"]
    assert {run.method: run.value for run in runs} == best
    cells = {(run.method, run.noise, run.size, run.seed) for run in runs}
    assert len(cells) == len(runs) == len(plan.METHODS) * len(plan.LEVELS) * len(plan.SEEDS)
    assert len({run.name for run in runs}) == len(runs)
    longer = plan.plan_runs(["long"], lines)
    assert {run.method: run.value for run in longer} == {name: best[name] for name in plan.COMPARED}


def test_a_generation_waits_for_the_one_before_and_two_processes_take_different_runs(study, plan, tmp_path):
    lines = searched(plan, {name: method.values[0] for name, method in plan.METHODS.items()})
    runs = plan.plan_runs(["generations"], lines)
    assert study.take_run(runs, set(), tmp_path) is None
    grid = {run.name for run in plan.plan_runs(["grid"], lines)}
    assert all(plan.teacher_of(run).name in grid for run in runs if run.generation == 2)
    for part in ("early", "short"):  # parts that make their own first teacher
        first, second = ({r.name: r for r in plan.plan_runs([part], lines) if r.generation == g} for g in (1, 2))
        assert second and {plan.teacher_of(run).name for run in second.values()} == {*first}
    first, claim = study.take_run(runs, grid, tmp_path)
    with claim:
        other, claim = study.take_run(runs, grid, tmp_path)
    with claim:
        assert first.generation == other.generation == 2 and first != other
        again, claim = study.take_run(runs, grid, tmp_path)  # the first process has ended
    with claim:
        assert again == first


def test_a_run_is_trained_and_measured_and_teaches_the_next(study, tmp_path, tiny_config, monkeypatch):
    """Real runs with a small config."""

    def small(run, folder, steps, image_size):
        c = make_config(run, folder, steps, image_size)
        c.model, c.batch_size = (
            tiny_config.model,
            16,
        )  # the text tower has random weights, and is frozen as the real one is
        c.compilation_cache, c.eval.batch_size = tiny_config.compilation_cache, 16
        c.data.shapes.train, c.data.shapes.test = 96, 24
        return c

    make_config = study.make_config
    monkeypatch.setattr(study, "make_config", small)
    monkeypatch.setattr(study, "PROBED", 48)
    run = study.Run("grid", "self_distillation", value=0.05, probed=True)
    with monkeypatch.context() as context:
        context.setattr(study.loop, "train", lambda *_, **__: False)  # as if asked to stop
        with pytest.raises(SystemExit):
            study.perform_run(run, tmp_path, 6, 16, None)
    line, features = study.perform_run(run, tmp_path, 6, 16, None)
    assert [point["step"] for point in line["history"]] == [1, 2, 3, 4, 5, 6]
    last = line["history"][-1]
    assert 0 <= last["probe/mismatched/true"] <= 1 and 1 <= last["probe/captions_in_use"] <= 48
    following = study.Run("generations", "self_distillation", value=0.05, generation=2)
    last, _ = study.perform_run(following, tmp_path, 6, 16, features)
    assert "eval/test/hit@1" in last and "eval/test/student/hit@1" not in last  # there is no EMA


def test_the_probe_tells_true_soft_labels_from_constant_ones(study, tmp_path, tiny_config):
    """A model that embeds each image as its own caption, and one that embeds all images alike."""
    tiny_config.data.shapes.update(train=2_000, noise=0.4)
    probe = study.Probe(tiny_config)
    assert 0.3 < probe.mismatched.mean() < 0.5
    basis = np.eye(len(probe.true) + 1, dtype=np.float32)
    known = {caption: i for i, caption in enumerate(dict.fromkeys(probe.true))}

    class TruePredictor:
        def encode_text(self, texts):
            return basis[[known.get(text, len(known)) for text in texts]]

        def encode_image(self, images):
            return self.encode_text(probe.true)

    class ConstantPredictor(TruePredictor):
        def encode_image(self, images):
            return self.encode_text([probe.true[0]] * len(images))

    seen = probe({"": TruePredictor()})
    assert seen["probe/mismatched/true_is_likelier"] > 0.99 and seen["probe/clean/given"] > 0.5
    assert seen["probe/captions_in_use"] > 100
    assert probe({"": ConstantPredictor()})["probe/captions_in_use"] < 20


def test_intervals_are_those_of_students_t(report):
    values = [0.41, 0.44, 0.43]
    mean, half = report.interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_differences_are_between_runs_with_the_same_seed(report, tmp_path):
    hits = {("info_nce", 0): 0.30, ("info_nce", 1): 0.40, ("otter", 0): 0.32, ("otter", 1): 0.42, ("otter", 2): 0.9}
    cell = {"part": "grid", "noise": 0.4, "size": 20_000, "history": []}
    lines = [cell | {"method": m, "seed": s, report.TEACHER: hit} for (m, s), hit in hits.items()]
    lines += [line | {"noise": 0.0, report.TEACHER: 0.5} for line in lines]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = report.Results(path)
    assert results.gains("otter", 0.4, 20_000) == pytest.approx([0.02, 0.02])
    assert "| OTTER | +0.0 ± 0.0 | +2.0 ± 0.0 | +1.0 ± 1.8 |" in report.grid_tables(results, 20_000)
