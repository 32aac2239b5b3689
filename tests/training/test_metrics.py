"""What a run reports: metrics, throughput against given clocks, traces, and unreadable samples."""

import contextlib
import fcntl
import gzip
import io
import json
import logging
import os
import select
import struct
import sys
import termios

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.testing.faults import small_disk
from tests.testing.runs import read_metrics
from zslflax import checkpoint
from zslflax.errors import StorageError, UserError
from zslflax.training import loop, metrics, setup
from zslflax.training.events import Events
from zslflax.training.metrics import BadSampleCounter, Profile, Reporter
from zslflax.training.step import TrainStep


def test_a_reporter_keeps_earlier_lines_and_drops_later_and_broken_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 3.0}\n{"step": 4, "loss": 2.0}\n{"step": 6, "lo')
    with contextlib.closing(Reporter(tmp_path, step=3, steps=10)) as reporter:
        reporter.write(5, {"loss": 1.5, "grad_norm": float("inf")})
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 3.0}, {"step": 5, "loss": 1.5, "grad_norm": None}]
    assert sorted(entry.name.partition(".")[0] for entry in tmp_path.iterdir()) == ["events", "metrics"]


def read_events(folder):
    """The events in TensorBoard's file."""
    (path,) = folder.glob("events.out.tfevents.*")
    data = path.read_bytes()
    while data:  # length u64, its checksum u32, a protocol buffer, its checksum u32
        (length,) = struct.unpack_from("<Q", data)
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_has_the_metrics_and_the_figures_of_predictions(tmp_path):
    (tmp_path / "predictions").mkdir()
    for name, side in (("5.png", 8), ("5-pets.png", 9), ("50.png", 10)):
        Image.new("RGB", (side, side), "red").save(tmp_path / "predictions" / name)
    with contextlib.closing(Reporter(tmp_path, 0, 10)) as reporter:
        reporter.write(5, {"train/learning_rate": 0.25, "eval/test/hit@1": 0.5})
        reporter.write_figures(5)
    events = {value.tag: (event.step, value) for event in read_events(tmp_path) for value in event.summary.value}
    assert events.keys() == {"train/learning_rate", "eval/test/hit_at_1", "predictions", "predictions/pets"}
    assert events["train/learning_rate"][1].simple_value == 0.25
    step, value = events["predictions/pets"]
    assert (step, value.image.width) == (5, 9)
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
        assert image.size == (9, 9) and image.getpixel((4, 4)) == (255, 0, 0)


def test_a_figure_that_cannot_be_read_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "5.png").write_bytes(b"no image")
    with contextlib.closing(Reporter(tmp_path, 0, 10)) as reporter:
        reporter.write_figures(5)
        reporter.write(5, {"loss": 1.5})
    assert f"{tmp_path}/predictions/5.png cannot be read, and is not shown" in caplog.text
    assert [value.tag for event in read_events(tmp_path) for value in event.summary.value] == ["loss"]


def test_the_bar_moves_from_the_first_step_in_a_terminal_of_unknown_width(tmp_path, monkeypatch):
    ours, theirs = os.openpty()  # its width is 0
    with open(theirs, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with contextlib.closing(Reporter(tmp_path, 0, 1_000)) as reporter:
            reporter.bar.mininterval = 0
            reporter.step(1)
            shown = read_terminal(ours, "| 1/1000")
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
            reporter.step(3)
            narrower = read_terminal(ours, "| 3/1000")
    os.close(ours)
    widths = [max(len(line.rstrip()) for line in text.split("\r")) for text in (shown, narrower)]
    assert 70 < widths[0] <= 80 and 40 < widths[1] <= 50


def read_terminal(descriptor, until):
    """What a terminal shows up to the end of a line with `until`: the kernel may hand it over in parts, and late."""
    shown = b""
    while until.encode() not in shown or not shown.endswith(b"]"):
        ready, _, _ = select.select([descriptor], [], [], 60)
        assert ready, f"no {until!r} within 60 s in {shown!r}"
        shown += os.read(descriptor, 1 << 16)
    return shown.decode()


def test_a_reporter_that_is_not_active_writes_nothing(tmp_path):
    with contextlib.closing(Reporter(tmp_path, 0, 10, active=False)) as reporter:
        reporter.write(5, {"loss": 1.5})
        reporter.progress(5, 1.5, 10.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    [b"[1, 2]", b'{"step": null}', b'{"step": "3"}', b'{"loss": 1}', b"", b"\xff\xfe", b"[" * 100_000, b"\0" * 9],
)
def test_lines_of_metrics_that_cannot_be_read_are_dropped(tmp_path, caplog, line):
    whole = b'{"step": 2}\n', b'{"step": 4}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line.join(whole[:1] + (b"\n",)) + whole[1])
    metrics.remove_lines_after(tmp_path / "metrics.jsonl", 5)
    assert read_metrics(tmp_path) == [{"step": 2}, {"step": 4}]
    assert f"{tmp_path}/metrics.jsonl: 1 lines could not be read and are dropped" in caplog.text


def test_a_folder_in_place_of_the_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=f"{tmp_path}/metrics.jsonl cannot be written: Is a directory"):
        Reporter(tmp_path, 0, 10)


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    with small_disk(tmp_path, "32k") as disk:
        with contextlib.closing(Reporter(tmp_path, 0, 10)) as reporter:
            (disk / "rest").write_bytes(bytes(20 << 10))
            with pytest.raises(StorageError, match=f"{tmp_path}/metrics.jsonl cannot be written: No space left on dev"):
                for step in range(100):
                    reporter.write(step, {"loss": 1.5, "a_name_that_takes_space_" * 10: 1.0})
            (disk / "rest").unlink()


def test_events_on_a_full_disk_are_given_up_with_one_warning(tmp_path, caplog):
    with small_disk(tmp_path, "32k") as disk:
        events = Events(tmp_path, 0)
        (disk / "rest").write_bytes(bytes(20 << 10))
        for step in range(1_000):
            events.write(step, {"loss": 1.5})
        events.close()
        assert caplog.text.count("TensorBoard events in") == 1
        assert f"events in {tmp_path} are given up, and the run goes on without: [Errno 28]" in caplog.text
        Events(tmp_path / "nowhere", 0).write(1, {"loss": 1.5})
        assert caplog.text.count("TensorBoard events in") == 2


def test_events_have_the_curves_and_hide_those_of_later_steps(tmp_path):
    events = Events(tmp_path, 3)
    events.write(4, {"eval/hit@1": 0.5, "loss": 2.0})
    events.close()
    found = list(read_events(tmp_path))
    assert found[0].file_version == "brain.Event:2" and found[2].session_log.status == SessionLog.START
    assert found[2].step == 4
    curves = {event.summary.value[0].tag: event.summary.value[0].simple_value for event in found[3:]}
    assert curves == {"eval/hit_at_1": 0.5, "loss": 2.0} and {event.step for event in found[3:]} == {4}


def test_an_average_leaves_out_steps_without_the_metric():
    steps = [{"loss": np.float32(3)}, {"loss": np.float32(1), "truncated": np.float32(0.5)}]
    assert metrics.average(steps) == {"train/loss": 2.0, "train/truncated": 0.5}


def test_an_average_leaves_out_values_that_are_not_finite_and_has_the_last_counter():
    steps = [
        {"loss": jnp.float32(value), "grad_norm": jnp.float32("nan"), "nonfinite_steps": jnp.int32(i)}
        for i, value in enumerate((1.0, np.nan, 2.0))
    ]
    means = metrics.average(steps)
    assert means.pop("train/nonfinite_steps") == 2 and means.pop("train/loss") == 1.5
    assert np.isnan(means.pop("train/grad_norm")) and not means


class OnDevice:
    """Stands for a value on the devices, which only a step, a report or a save may read."""

    def __init__(self, value):
        self.value = value

    def is_ready(self):  # does not wait
        return all(array.is_ready() for array in jax.tree.leaves(self.value))


def test_between_reports_nothing_waits_for_the_devices(tiny_config, tmp_path, monkeypatch):
    """State and metrics go from step to step unread. Only functions that are meant to wait read them."""
    tiny_config.eval.sets.test.data, tiny_config.log_every = "", 3
    averaged = []
    take_step, average, save = TrainStep.__call__, metrics.average, checkpoint.save

    def read(value):
        return value.value if isinstance(value, OnDevice) else value

    def step(self, state, batch):
        return tuple(map(OnDevice, take_step(self, read(state), batch)))

    def read_and_average(recent):
        averaged.append(len(recent))
        return average(list(map(read, recent)))

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(loop, "average", read_and_average)
    monkeypatch.setattr(setup, "evaluate_state", lambda *args: {})
    monkeypatch.setattr(
        checkpoint, "save", lambda manager, state, *args, **kwargs: save(manager, read(state), *args, **kwargs)
    )
    for field in ("failed_step", "step"):  # read by reports and saves
        monkeypatch.setattr(
            OnDevice, field, property(lambda self, field=field: getattr(self.value, field)), raising=False
        )
    loop.train(tiny_config, tmp_path)
    assert averaged == [3, 3]


def trace_events(folder):
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def traced_steps(folder):
    return [event["args"]["step_num"] for event in trace_events(folder) if event.get("name") == "train_step"]


def test_a_run_writes_a_trace_of_the_steps_in_its_config(tiny_config, tmp_path, caplog, monkeypatch):
    tiny_config.profile_steps, tiny_config.steps, tiny_config.eval.sets.test.data = "2:3", 4, ""
    monkeypatch.setattr(logging.getLogger("zslflax"), "propagate", True)
    with caplog.at_level("INFO", "zslflax"):
        loop.train(tiny_config, tmp_path)
    assert traced_steps(tmp_path / "profile") == ["2", "3"]
    assert any("dot" in event.get("name", "") for event in trace_events(tmp_path / "profile"))  # on the devices
    assert "a trace of steps 2 to 3 is in" in caplog.text and "xprof" in caplog.text
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/flops_per_second"] > 0 and "train/mfu" not in last  # the peak of a CPU is not known


def profiled(profile, step, function, *arguments):
    """Calls a function as a step is called."""
    profile.before(step, ())
    result = function(*arguments)
    profile.after(step, result)


def test_a_trace_ends_with_a_run_that_fails_in_the_middle_of_it(tmp_path):
    with pytest.raises(ZeroDivisionError), contextlib.closing(Profile((2, 9), tmp_path)) as profile:
        profiled(profile, 1, jnp.sin, 1.0)
        profiled(profile, 5, jnp.sin, 1.0)  # a run that resumed there
        profiled(profile, 6, lambda: 1 / 0)
    assert traced_steps(tmp_path) == ["5", "6"]
    with contextlib.closing(Profile((1, 1), tmp_path / "next")) as profile:
        profiled(profile, 1, jnp.sin, 1.0)
    assert trace_events(tmp_path / "next")


def test_too_many_unreadable_samples_are_an_error_that_names_their_shards(caplog):
    counter = BadSampleCounter(max_fraction=0.1)
    errors = [("b.tar:1", "truncated"), ("a.tar:1", "truncated"), ("b.tar:2", "not an image")]
    with caplog.at_level("WARNING", "zslflax"):
        for _ in range(30):
            counter.count(errors, 10)  # far too many of 300, which are too few samples to judge by
        assert caplog.text.count("unreadable sample") == BadSampleCounter.MAX_LOGGED
    counter.count([("b.tar:3", "truncated")], 1_000)  # 91 of 1,300
    with pytest.raises(
        UserError, match=r"(?s)131 of 1300 samples .* data.max_bad_fraction = 0.1;.*b.tar: 101\n.*a.tar: 30"
    ):
        counter.count([("b.tar:4", "truncated")] * 40, 0)


def test_readable_samples_never_stop_a_run():
    counter = BadSampleCounter(max_fraction=0.0)
    counter.count([], 5_000)
    with pytest.raises(UserError, match="1 of 5001 samples"):
        counter.count([("a.tar:1", "truncated")], 1)
