"""Whole runs: what they write, how they resume, and which workdirs and configs they refuse."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests.testing.runs import act_at_batch, assert_same_bits, read_metrics, read_state
from zslflax import checkpoint
from zslflax.config import eval_set
from zslflax.data.sources import shapes
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.recaptioned import Recaptioned
from zslflax.data.sources.tar_index import load_index
from zslflax.errors import MissingFileError, NonFiniteError, UserError
from zslflax.inference.predictor import Predictor
from zslflax.training import loop
from zslflax.training.step import TrainStep
from zslflax.training.stopwatch import are_ready


class Killed(BaseException):
    """Ends a run as if its process were killed."""


def kill_at(monkeypatch, step, workdir):
    """Ends the run when the batch of a step is made, once the checkpoint before has been written in the background."""

    def kill():
        while not checkpoint.complete_steps(workdir):
            time.sleep(0.01)
        raise Killed

    act_at_batch(monkeypatch, step, kill)


@pytest.fixture
def damaged_shard(tiny_config, tmp_path):
    """A training shard of which more than a whole batch has unreadable images."""
    c = tiny_config.data.shapes
    folder = shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).path
    shard = tmp_path / "damaged.tar"
    shutil.copy(folder / "train-00000.tar", shard)
    index = load_index(str(shard))
    images = np.flatnonzero(index.extensions[index.extension] == "jpg")[:24]
    with open(shard, "r+b") as file:
        for i in images:
            file.seek(index.offset[i])
            file.write(bytes(int(index.size[i])))
    return str(shard)


@pytest.mark.parametrize("kind", ["packed captions", "cached text features", "unreadable images"])
def test_a_killed_run_resumes_to_the_same_bits(tiny_config, damaged_shard, tmp_path, monkeypatch, kind):
    c = tiny_config
    if kind == "unreadable images":
        c.data.train, c.data.max_bad_fraction = (damaged_shard,), 0.5
    if kind == "packed captions":
        c.model.text.pack_length = 16
    if kind == "cached text features":
        c.freeze, c.model.text.cached_captions = (("text/tower", -1),), 100
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    loop.train(c, whole)
    with monkeypatch.context() as context:
        kill_at(context, 6, resumed)  # after step 4 was reported and before step 6 was saved
        with pytest.raises(Killed):
            loop.train(c, resumed)
    assert checkpoint.complete_steps(resumed) == [3] and read_metrics(resumed)[-1]["step"] == 4
    loop.train(c, resumed)
    assert_same_bits(read_state(whole, 6), read_state(resumed, 6))
    assert read_metrics(whole) == read_metrics(resumed)
    assert [line["step"] for line in read_metrics(resumed)] == [2, 3, 4, 6]
    if kind == "unreadable images":
        assert min(line["train/pairs"] for line in read_metrics(resumed)) < c.batch_size


def test_a_run_writes_metrics_pictures_and_a_model_that_can_be_restored(tiny_config, trained_workdir):
    workdir = trained_workdir
    assert json.loads((workdir / "config.json").read_text())["name"] == "tiny"
    assert list(workdir.glob("events.out.tfevents.*"))
    assert checkpoint.complete_steps(workdir) == [3, 6]
    last = read_metrics(workdir)[-1]
    for who in ("", "student/"):
        for metric in ("hit@1", "hit@10", "mAP", "seen/hit@1", "synonyms/hit@1", "retrieval/image_to_text@5"):
            assert 0.0 <= last[f"eval/test/{who}{metric}"] <= 1.0
    with Image.open(workdir / "predictions" / "6.png") as image:
        assert image.size[0] > 600 and len(image.getcolors(1 << 20)) > 100

    predictor = Predictor.restore(workdir)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    class_names = ["red circle", "dog", "a cat"]
    (best,) = predictor.classify(image, class_names, top_k=2)
    scores = predictor.encode_image(image) @ predictor.class_embeddings(class_names).T
    assert [score for _, score in best] == pytest.approx(np.sort(scores[0])[:0:-1].tolist(), abs=1e-5)
    student = Predictor.restore(workdir, use="student", step=3)
    assert student.step == 3 and np.abs(student.encode_text("a cat") - predictor.encode_text("a cat")).max() > 1e-4


def test_few_steps_are_in_flight_at_once(tiny_config, tmp_path, monkeypatch):
    take_step, metrics, in_flight = TrainStep.__call__, [], []

    def take_counted_step(self, state, batch):
        in_flight.append(sum(not are_ready(earlier) for earlier in metrics))
        state, last = take_step(self, state, batch)
        metrics.append(last)
        return state, last

    monkeypatch.setattr(TrainStep, "__call__", take_counted_step)
    tiny_config.steps = tiny_config.log_every = tiny_config.eval.every = tiny_config.checkpoint.every = 12
    tiny_config.eval.sets.test.data = ""
    loop.train(tiny_config, tmp_path)
    assert len(in_flight) == 12 and max(in_flight) <= loop.STEPS_AHEAD


def test_a_first_evaluation_comes_early(tiny_config, tmp_path):
    tiny_config.steps = tiny_config.log_every = tiny_config.eval.every = tiny_config.checkpoint.every = 4
    tiny_config.eval.first = 1
    loop.train(tiny_config, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path) if "eval/test/hit@1" in line] == [1, 4]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"1", "4"}


def test_a_finished_run_has_nothing_left_to_do(tiny_config, trained_workdir):
    before = (trained_workdir / "metrics.jsonl").read_text()
    loop.train(tiny_config, trained_workdir)
    assert (trained_workdir / "metrics.jsonl").read_text() == before


def test_the_workdir_of_another_config_is_refused(tiny_config, trained_workdir):
    tiny_config.eval.every = tiny_config.log_every = 2  # may change
    loop.train(tiny_config, trained_workdir)
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.01 there, 0.5 now"):
        loop.train(tiny_config, trained_workdir)
    assert json.loads((trained_workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 0.01


def test_a_run_takes_the_sources_that_it_is_given(tiny_config, trained_workdir, tmp_path):
    source = open_source("shapes", tiny_config.data, "train")
    loop.train(tiny_config, trained_workdir, sources=[source])  # it is the data of the finished run
    changed = Recaptioned(source, ["a blue circle"] * len(source))
    with pytest.raises(UserError, match="holds a run of another data"):
        loop.train(tiny_config, trained_workdir, sources=[changed])
    with pytest.raises(UserError, match="there are 2 sources, but config.data.train names 1"):
        loop.train(tiny_config, tmp_path, sources=[source, changed])
    loop.train(tiny_config, tmp_path, sources=[changed])
    losses = [read_metrics(workdir)[-1]["train/loss"] for workdir in (trained_workdir, tmp_path)]
    assert abs(losses[1] - losses[0]) > 0.01


def test_a_config_with_lists_is_the_same_at_the_next_start(tiny_config, tmp_path):
    tiny_config.freeze, tiny_config.steps, tiny_config.eval.sets.test.data = [["text/tower", 3]], 2, ""
    loop.train(tiny_config, tmp_path)
    loop.train(tiny_config, tmp_path)


def test_a_run_beyond_its_last_step_is_refused(tiny_config, trained_workdir):
    tiny_config.steps = 5
    with pytest.raises(UserError, match="steps is 5, but .* is at step 6 already"):
        loop.train(tiny_config, trained_workdir, changed=True)


def test_a_run_that_resumes_with_longer_captions_is_restored_with_them(tiny_config, trained_workdir):
    tiny_config.model.text.max_tokens, tiny_config.steps = 14, 7
    loop.train(tiny_config, trained_workdir, changed=True)
    assert Predictor.restore(trained_workdir).tokenizer.identity["max_tokens"] == 14


def test_a_mistake_found_before_the_first_checkpoint_can_be_corrected(tiny_config, tmp_path):
    tiny_config.batch_size = 128
    with pytest.raises(UserError, match="the training data has 96 samples, fewer than one batch of 128"):
        loop.train(tiny_config, tmp_path)
    tiny_config.batch_size, tiny_config.eval.sets.test.data = 16, str(tmp_path / "nowhere.tar")
    with pytest.raises(MissingFileError, match="nowhere.tar"):  # before any training
        loop.train(tiny_config, tmp_path)
    tiny_config.eval.sets.test.data = ""
    loop.train(tiny_config, tmp_path)


def test_too_many_unreadable_samples_stop_the_run(tiny_config, damaged_shard, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.BadSampleCounter, "MIN_SAMPLES", 32)
    tiny_config.data.train = (damaged_shard,)
    with pytest.raises(
        UserError, match=r"(?s)could not be read, more than data.max_bad_fraction = 0.05.*damaged.tar: \d+"
    ):
        loop.train(tiny_config, tmp_path / "run")


def test_a_non_finite_loss_stops_the_run_and_saves_the_state_before_it(tiny_config, tmp_path):
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 1e12
    tiny_config.eval.sets.test.data = ""
    with pytest.raises(NonFiniteError, match=r"step \d+ is not finite; the state before it is saved as step"):
        loop.train(tiny_config, tmp_path)
    (step,) = checkpoint.complete_steps(tmp_path)
    assert 0 < step < 6
    state = read_state(tmp_path, step)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state)) and int(state["failed_step"]) == -1


def test_an_error_after_a_non_finite_loss_saves_the_state_before_the_loss(tiny_config, tmp_path, monkeypatch):
    """The run fails while it reads data, before it has reported the non-finite step."""
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 1e12
    tiny_config.eval.sets.test.data, tiny_config.log_every = "", 6
    tiny_config.checkpoint.every = tiny_config.eval.every = 6

    def fail():
        raise OSError("the disk is gone")

    act_at_batch(monkeypatch, 6, fail)
    with pytest.raises(NonFiniteError, match=r"step \d+ is not finite; the state before it is saved as step"):
        loop.train(tiny_config, tmp_path)
    (step,) = checkpoint.complete_steps(tmp_path)
    assert int(read_state(tmp_path, step)["failed_step"]) == -1


def test_another_run_can_be_the_teacher(tiny_config, trained_workdir, tmp_path):
    c = tiny_config
    c.teacher.kind, c.teacher.workdir = "checkpoint", str(trained_workdir)
    c.model.embed_dim, c.steps = 12, 2
    loop.train(c, tmp_path / "student")
    last = read_metrics(tmp_path / "student")[-1]
    assert "eval/test/hit@1" in last and "eval/test/student/hit@1" not in last  # there is no average
    c.model.text.max_tokens = 10
    with pytest.raises(UserError, match="model.text.max_tokens"):
        loop.train(c, tmp_path / "other")


def test_a_test_set_with_captions_alone_is_evaluated_by_retrieval(tiny_config, tmp_path):
    c = tiny_config.data.shapes
    captioned = shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).train
    with tiny_config.unlocked():
        tiny_config.eval.sets.captions = eval_set(data=captioned)
    tiny_config.eval.every = 6
    loop.train(tiny_config, tmp_path)
    names = {name.rpartition("/")[2] for name in read_metrics(tmp_path)[-1] if name.startswith("eval/captions/")}
    assert names == {f"{direction}@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert {p.name for p in (tmp_path / "predictions").iterdir()} == {"6-test.png", "6-captions.png"}


@pytest.mark.parametrize(
    "entropy, on_pair, remove_diagonal, warned",
    [
        (0.13, 0.011, False, True),  # a run on shapes at temperature 0.01 from the first step, which learned nothing
        (0.22, 0.049, False, True),  # the same with a ramp
        (2.83, 0.070, False, False),  # the same at 0.05, which learned
        (0.30, 0.650, False, False),  # a good teacher
        (0.13, 0.0, True, False),  # without the diagonal, nothing is ever on the pair
    ],
)
def test_collapsed_soft_labels_cause_a_warning(caplog, tiny_config, entropy, on_pair, remove_diagonal, warned):
    tiny_config.objective.remove_diagonal = remove_diagonal
    with caplog.at_level("WARNING", logger="zslflax"):
        loop.warn_of_collapse(tiny_config.objective, {"train/soft_entropy": entropy, "train/soft_on_pair": on_pair})
        loop.warn_of_collapse(tiny_config.objective, {"train/loss": 1.0})
    assert ("teacher_temperature" in caplog.text) == warned


def test_a_run_with_collapsed_soft_labels_logs_the_warning(caplog, tiny_config, tmp_path):
    """A temperature near 0 and no hard labels: the soft labels of all images are the same few captions."""
    tiny_config.objective.teacher_temperature, tiny_config.objective.alpha = 1e-4, 0.0
    with caplog.at_level("WARNING", logger="zslflax"):
        loop.train(tiny_config, tmp_path)
    assert "the same few captions" in caplog.text
