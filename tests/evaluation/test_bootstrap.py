"""Bootstrap intervals against scipy's: of means, of means over some images, and of ratios."""

import numpy as np
import pytest
from scipy import stats

from zslflax.evaluation.bootstrap import bootstrap, intervals

RESAMPLES = 6000


def ratio(sums, counts, axis):
    return sums.sum(axis) / counts.sum(axis)


def test_intervals_equal_scipys():
    rng = np.random.default_rng(0)
    n = 80
    figures = {
        "hits": (rng.random(n) < 0.3, np.ones(n)),
        "fractions": (rng.random(n), np.ones(n)),
        "some": (rng.random(n) < 0.6, rng.random(n) < 0.4),
        "captions": (rng.integers(0, 3, n), rng.integers(2, 6, n)),
    }
    means, draws = bootstrap(figures, RESAMPLES, seed=1)
    means["hits alone"], draws["hits alone"] = (
        of["hits"]
        for of in bootstrap({"hits": figures["hits"]}, RESAMPLES, seed=1)  # only two different rows
    )
    figures["hits alone"] = figures["hits"]
    found = intervals(draws)
    for name, (sums, counts) in figures.items():
        sums = np.where(counts, sums, 0).astype(float)
        counts = np.asarray(counts, float)
        assert means[name] == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)
        expected = stats.bootstrap(
            (sums, counts),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(2),
        )
        low, high = expected.confidence_interval
        width = high - low
        assert found[name] == pytest.approx((low, high), abs=0.08 * width)
        assert np.std(draws[name]) == pytest.approx(expected.standard_error, rel=0.05)


def test_all_metrics_of_a_resample_have_the_same_images():
    values = np.random.default_rng(0).random(30)
    _, draws = bootstrap({"a": (values, np.ones(30)), "b": (1 - values, np.ones(30))}, 50)
    np.testing.assert_allclose(draws["a"] + draws["b"], 1, rtol=1e-12)


def test_resamples_depend_on_the_seed_and_not_on_the_chunk_size(monkeypatch):
    values = np.random.default_rng(0).random(30)
    runs = [bootstrap({"a": (values, np.ones(30))}, 50, seed)[1]["a"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    monkeypatch.setattr("zslflax.evaluation.bootstrap.CHUNK", 200)
    np.testing.assert_allclose(bootstrap({"a": (values, np.ones(30))}, 50)[1]["a"], runs[0], rtol=1e-12)


def test_metrics_of_few_images_or_without_resamples():
    nan = float("nan")
    means, draws = bootstrap({"all": ([1.0, 1.0], [1, 1]), "one": ([nan, 0.5], [0, 1])}, 200)
    assert means == {"all": 1.0, "one": 0.5}
    # "one" is missing in a quarter of the resamples, which are ignored.
    assert intervals(draws) == {"all": (1.0, 1.0), "one": (0.5, 0.5)}
    assert np.isnan(draws["one"]).mean() == pytest.approx(0.25, abs=0.1)
    means, draws = bootstrap({"none": ([1.0], [0])}, 0)
    assert np.isnan(means["none"]) and intervals(draws) == {}
