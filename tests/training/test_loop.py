"""Whole runs: what they write, how they go on after a stop, and what they refuse."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from PIL import Image

from zslflax.data import pipeline
from zslflax.data.sources import shapes
from zslflax.data.sources.tar_index import load_index
from zslflax.evaluation.zero_shot import evaluate
from zslflax.inference.predictor import Predictor
from zslflax.training import checkpoint, loop
from zslflax.training.metrics import MEASURED
from zslflax.training.train_state import TrainState


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in found]


def saved(workdir, step):
    return checkpoint.restore_parts(workdir, step, tuple(TrainState.__dataclass_fields__))


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Killed(BaseException):
    """What a process feels that is killed."""


def kill_at(monkeypatch, step, workdir):
    """From now on, the training batch of a step is the end of the process."""
    batches = pipeline.train_batches

    def dying(*args, start_step=0, **kwargs):
        for i, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start=start_step + 1):
            if i == step:
                while not checkpoint.available(workdir):  # saved in the background
                    time.sleep(0.01)
                raise Killed
            yield batch

    monkeypatch.setattr(pairs, "train_batches", dying)


@pytest.fixture
def damaged(tiny, tmp_path):
    """Training shards of which more than a whole batch has lost its pictures."""
    c = tiny.data.shapes
    folder = shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).path
    shard = tmp_path / "damaged.tar"
    shutil.copy(folder / "train-00000.tar", shard)
    index = load_index(str(shard))
    pictures = np.flatnonzero(index.extensions[index.extension] == "jpg")[:24]
    with open(shard, "r+b") as file:
        for i in pictures:
            file.seek(index.offset[i])
            file.write(bytes(int(index.size[i])))
    return str(shard)


@pytest.mark.parametrize("kind", ["packed captions", "kept text features", "unreadable images"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tiny, damaged, tmp_path, monkeypatch, kind):
    if kind == "unreadable images":
        tiny.data.train, tiny.data.max_bad_fraction = (damaged,), 0.5
    if kind == "packed captions":
        tiny.model.text.pack_length = 16
    if kind == "kept text features":
        tiny.freeze, tiny.model.text.cached_captions = (("text/tower", -1),), 100
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(tiny, whole)
    with monkeypatch.context() as context:
        kill_at(context, 6, parts)  # after step 4 was reported and before step 6 was saved
        with pytest.raises(Killed):
            loop.train(tiny, parts)
    assert checkpoint.available(parts) == [3] and lines(parts)[-1]["step"] == 4
    loop.train(tiny, parts)
    assert_same_bits(saved(whole, 6), saved(parts, 6))
    assert lines(whole) == lines(parts)
    assert [line["step"] for line in lines(parts)] == [2, 3, 4, 6]
    if kind == "unreadable images":
        assert min(line["train/pairs"] for line in lines(parts)) < tiny.batch_size


def test_what_a_run_writes_and_what_is_restored_from_it(tiny, workdir):
    assert json.loads((workdir / "config.json").read_text())["name"] == "tiny"
    assert list(workdir.glob("events.out.tfevents.*"))
    assert checkpoint.available(workdir) == [3, 6]
    last = lines(workdir)[-1]
    for who in ("", "student/"):
        for metric in ("hit@1", "hit@10", "mAP", "seen/hit@1", "synonyms/hit@1", "retrieval/image_to_text@5"):
            assert 0.0 <= last[f"eval/test/{who}{metric}"] <= 1.0
    with Image.open(workdir / "predictions" / "6.png") as picture:
        assert picture.size[0] > 600 and len(picture.getcolors(1 << 20)) > 100

    # The same figures again from the checkpoint, and the same answers from the folder alone.
    # What the model is says its folder, not the config that asks.
    tiny.model.image.size, tiny.teacher.kind = 32, "none"
    evaluated = evaluate(tiny, workdir)
    for name, value in last.items():
        if name.startswith("eval/"):
            assert evaluated[name] == pytest.approx(value, abs=1e-6), name
    assert evaluated["eval/test/hit@1/low"] <= evaluated["eval/test/hit@1"] <= evaluated["eval/test/hit@1/high"]
    predictor = Predictor.restore(workdir)
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    (best,) = predictor.classify(picture, ["red circle", "dog", "a cat"], top_k=2)
    scores = predictor.encode_image(picture) @ predictor.class_embeddings(["red circle", "dog", "a cat"]).T
    assert [score for _, score in best] == pytest.approx(np.sort(scores[0])[:0:-1].tolist(), abs=1e-5)
    student = Predictor.restore(workdir, use="student", step=3)
    assert student.step == 3 and np.abs(student.encode_text("a cat") - predictor.encode_text("a cat")).max() > 1e-4


def test_a_finished_run_has_nothing_left_to_do(tiny, workdir):
    before = (workdir / "metrics.jsonl").read_text()
    loop.train(tiny, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_the_workdir_of_another_config_is_refused(tiny, workdir):
    tiny.eval.every = tiny.log_every = 2  # how often something is said is no difference
    loop.train(tiny, workdir)
    tiny.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.01 there, 0.5 now"):
        loop.train(tiny, workdir)
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 0.01


def test_a_config_with_lists_is_the_same_at_the_next_start(tiny, tmp_path):
    tiny.freeze, tiny.steps, tiny.eval.sets.test.data = [["text/tower", 3]], 2, ""
    loop.train(tiny, tmp_path)
    loop.train(tiny, tmp_path)


def test_a_run_is_not_taken_back(tiny, workdir):
    tiny.steps = 5
    with pytest.raises(ValueError, match="steps is 5, but .* is at step 6 already"):
        loop.train(tiny, workdir, changed=True)


def test_a_run_that_goes_on_with_longer_captions_is_used_with_them(tiny, workdir):
    tiny.model.text.max_tokens, tiny.steps = 14, 7
    loop.train(tiny, workdir, changed=True)
    assert Predictor.restore(workdir).tokenizer.identity["max_tokens"] == 14


def test_a_mistake_found_before_the_first_checkpoint_can_be_mended(tiny, tmp_path):
    tiny.batch_size = 128
    with pytest.raises(ValueError, match="the training data has 96 samples, fewer than one batch of 128"):
        loop.train(tiny, tmp_path)
    tiny.batch_size, tiny.eval.sets.test.data = 16, str(tmp_path / "nowhere.tar")
    with pytest.raises(FileNotFoundError, match="nowhere.tar"):  # before any training
        loop.train(tiny, tmp_path)
    tiny.eval.sets.test.data = ""
    loop.train(tiny, tmp_path)


def test_too_many_unreadable_samples_stop_the_run(tiny, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.BadSamples, "ENOUGH", 32)
    tiny.data.train = (damaged,)
    with pytest.raises(
        ValueError, match=r"(?s)could not be read, more than data.max_bad_fraction = 0.05.*damaged.tar: \d+"
    ):
        loop.train(tiny, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_state_before_it(tiny, tmp_path):
    tiny.optimizer.name, tiny.optimizer.learning_rate = "sgd", 1e12
    tiny.eval.sets.test.data = ""
    with pytest.raises(FloatingPointError, match=r"step \d+ is not finite; the state before it is saved as step"):
        loop.train(tiny, tmp_path)
    (step,) = checkpoint.available(tmp_path)
    assert 0 < step < 6
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(saved(tmp_path, step)))


def test_another_run_teaches(tiny, workdir, tmp_path):
    tiny.teacher.kind, tiny.teacher.workdir = "checkpoint", str(workdir)
    tiny.model.embed_dim, tiny.steps = 12, 2
    loop.train(tiny, tmp_path / "student")
    last = lines(tmp_path / "student")[-1]
    assert "eval/test/hit@1" in last and "eval/test/student/hit@1" not in last  # no average: one model
    tiny.model.text.max_tokens = 10
    with pytest.raises(ValueError, match="model.text.max_tokens"):
        loop.train(tiny, tmp_path / "other")


def test_two_sets_one_of_captions_alone(tiny, tmp_path):
    c = tiny.data.shapes
    captioned = shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).train
    with tiny.unlocked():
        tiny.eval.sets.captions = {
            "data": captioned,
            "names": "",
            "unseen": "",
            "synonyms": "",
            "classes": "",
            "wordnet": "",
        }
    tiny.eval.every = 6
    loop.train(tiny, tmp_path)
    names = {name.rpartition("/")[2] for name in lines(tmp_path)[-1] if name.startswith("eval/captions/")}
    assert names == {f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert {p.name for p in (tmp_path / "predictions").iterdir()} == {"6-test.png", "6-captions.png"}


@pytest.mark.parametrize(
    "entropy, on_pair, remove_diagonal, warned",
    [
        (0.13, 0.011, False, True),  # of a run on scenes at temperature 0.01 from the first step, which learnt nothing
        (0.22, 0.049, False, True),  # the same with a ramp
        (2.83, 0.070, False, False),  # at 0.05, which learnt
        (0.30, 0.650, False, False),  # a teacher that knows
        (0.13, 0.0, True, False),  # without the diagonal there is never anything on the pair
    ],
)
def test_soft_labels_that_collapse_are_told_of(caplog, tiny, entropy, on_pair, remove_diagonal, warned):
    tiny.objective.remove_diagonal = remove_diagonal
    with caplog.at_level("WARNING", logger="zslflax"):
        loop.warn_of_collapse(tiny.objective, {"train/soft_entropy": entropy, "train/soft_on_pair": on_pair})
        loop.warn_of_collapse(tiny.objective, {"train/loss": 1.0})
    assert ("teacher_temperature" in caplog.text) == warned


def test_a_run_whose_soft_labels_collapse_says_so(caplog, tiny, tmp_path):
    """Every image is taught what the first caption's neighbours are: a temperature near 0, and no hard labels."""
    tiny.objective.teacher_temperature, tiny.objective.alpha = 1e-4, 0.0
    with caplog.at_level("WARNING", logger="zslflax"):
        loop.train(tiny, tmp_path)
    assert "the same few captions" in caplog.text
