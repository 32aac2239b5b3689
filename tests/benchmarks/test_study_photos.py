"""The study of photographs in benchmarks/: its pairs, the plan of its runs, and its measures."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.testing.benchmarks import imported
from tests.testing.shards import write_tar


@pytest.fixture(scope="module")
def benchmarks():
    with imported("photos_data", "photos_plan", "photos_report") as modules:
        yield modules


NAMES = ("cat", "dog", "owl", "fox")  # the last one has no training photographs


@pytest.fixture(scope="module")
def photos(benchmarks, tmp_path_factory):
    folder, file = tmp_path_factory.mktemp("photos"), io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    train, test = [], []
    for i in range(3 * 40):
        name = NAMES[i % 3]
        for end, data in (
            ("jpg", file.getvalue()),
            ("txt", f"{name} 0".encode()),
            ("json", json.dumps({"true": name}).encode()),
        ):
            train.append((f"{i:04}.{end}", data))
    for i in range(8):
        test += [(f"{i}.jpg", file.getvalue()), (f"{i}.cls", str(i % 4).encode())]
    write_tar(folder / "train-00000.tar", train)
    write_tar(folder / "test-00000.tar", test)
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "unseen.txt").write_text("fox\n")
    (folder / "sentences.json").write_text(json.dumps({name: [f"{name} {i}" for i in range(5)] for name in NAMES}))
    return benchmarks[0].Photos(folder)


def test_wrong_sentences_are_an_exact_share_and_of_another_class_with_training_photographs(photos):
    pairs = photos.pairs(60, 0.4, seed=3, held_out=False)
    assert len(pairs.index) == 60 and pairs.wrong.sum() == 24
    assert np.bincount(photos.labels[pairs.index]).tolist() == [20, 20, 20]
    for position, caption, wrong in zip(pairs.index, pairs.captions, pairs.wrong, strict=True):
        assert (caption.split()[0] != NAMES[photos.labels[position]]) == wrong and "fox" not in caption
    assert [pairs.source.read_annotations(i)["text"] for i in range(60)] == [(caption,) for caption in pairs.captions]
    assert pairs.source.source.fingerprint() == photos.source.fingerprint()  # so that features are shared


def test_noise_changes_no_photographs_and_adds_to_the_wrong_ones(photos):
    few, many = (photos.pairs(60, noise, seed=3, held_out=False) for noise in (0.2, 0.6))
    np.testing.assert_array_equal(few.index, many.index)
    assert np.all(many.wrong[few.wrong])
    assert [c for c, wrong in zip(many.captions, few.wrong) if wrong] == [
        c for c, w in zip(few.captions, few.wrong) if w
    ]
    other = photos.pairs(60, 0.2, seed=4, held_out=False)
    assert set(other.index) != set(few.index)


def test_held_out_photographs_are_in_no_pair_of_the_search(photos):
    assert np.bincount(photos.labels[photos.held_out]).tolist() == [25, 25, 25]
    pairs = photos.pairs(120, 0.4, seed=3, held_out=True)
    assert len(pairs.index) == 45 and not photos.held_out[pairs.index].any()


def test_pairs_with_low_scores_are_left_out(benchmarks, photos):
    pairs = photos.pairs(60, 0.4, seed=3, held_out=False)
    kept = benchmarks[0].kept_pairs(pairs, np.where(pairs.wrong, -1.0, np.arange(60)), left_out=0.4)
    assert len(kept.index) == len(kept.source) == 36 and not kept.wrong.any()
    assert [kept.source.read_annotations(i)["text"] for i in range(36)] == [(caption,) for caption in kept.captions]


def test_auc_is_the_share_of_ordered_couples(benchmarks):
    rng = np.random.default_rng(0)
    scores, wrong = rng.normal(size=50), rng.random(50) < 0.3
    expected = np.mean(scores[~wrong][:, None] > scores[wrong])
    assert benchmarks[0].auc(scores, wrong) == pytest.approx(expected)


@pytest.mark.parametrize("most", [1.5, 4.0, 24.0])
def test_the_search_is_the_same_for_all_methods_and_ends_at_the_best(benchmarks, most):
    """With hits that fall with the distance of the passes to `most`, and with the parameter's place in the list."""
    plan, lines = benchmarks[1], []
    hits = lambda run: -abs(np.log(run.passes / most)) - 0.01 * plan.METHODS[run.method].values.index(run.value)
    while len(lines) < 1_000:
        done = {line["name"] for line in lines}
        run = next((run for run in plan.plan_runs(lines) if run.name not in done), None)
        if run is None:
            break
        lines.append(run._asdict() | {"name": run.name, "hit@1": hits(run)})
    assert len({line["name"] for line in lines}) == len(lines)
    searched = [line for line in lines if line["part"] == "search"]
    for noise, size, _ in plan.LEVELS:
        tried = [line["method"] for line in searched if (line["noise"], line["size"]) == (noise, size)]
        assert len({tried.count(method) for method in plan.METHODS}) == 1 and set(tried) == set(plan.METHODS)
    grid = [line for line in lines if (line["part"], line["noise"], line["size"]) == ("grid", 0.4, plan.ALL)]
    assert {line["passes"] for line in grid} == {most} and len(grid) == 5 * len(plan.METHODS)
    names = {line["name"] for line in lines}
    assert all(line["teacher"] in names for line in lines if line["part"] == "generations")
    assert all(line["kept"].split()[0] in names for line in lines if line["part"] == "kept")


def test_noisy_pairs_are_worth_the_clean_ones_with_the_same_hits(benchmarks):
    curve = {4_000: [0.1, 0.3], 16_000: [0.4]}
    assert benchmarks[2].worth(curve, 0.3) == "8,000"  # half way between, in the logarithm of the size
    assert (
        benchmarks[2].worth(curve, 0.1) == "fewer than 4,000" and benchmarks[2].worth(curve, 0.5) == "more than 16,000"
    )
