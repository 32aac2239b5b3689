"""What a run says of its speed, and the traces that it writes, against clocks and counts of others."""

import contextlib
import functools
import gzip
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import batch_of, config_of, start, variables  # noqa: F401
from zslflax import distributed
from zslflax.config import default_config, profiled_steps
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.resnet import ResNet
from zslflax.models.vit import ViT
from zslflax.training import checkpoint, flops, loop, metrics
from zslflax.training.metrics import Profile, Stopwatch
from zslflax.training.step import AXIS, TrainStep, gradients, train_step


def counted(function, *arguments):
    return flops.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_are_counted_as_xla_does_and_loops_as_often_as_they_run():
    x, w = jnp.ones((5, 7)), jnp.ones((7, 7))
    product = lambda w, x: x @ w
    assert counted(product, w, x) == {"float32": jax.jit(product).lower(w, x).compile().cost_analysis()["flops"]}
    looped = lambda w, x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]
    assert counted(looped, w, x) == {"float32": 6 * 2 * 5 * 7 * 7}
    again = jax.grad(lambda w, x: jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w) @ w)(w)))
    plain = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w) @ w))
    assert counted(plain, w, x)["float32"] < counted(again, w, x)["float32"]  # the hardware does it once more


def test_towers_compute_in_bfloat16():
    """All products but those with the softmax's fp32 gradient, of which large towers have a smaller share."""
    image, text = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 16), jnp.int32)
    towers = [
        (ResNet((1, 1), True, jnp.bfloat16), (image,)),
        (ViT(4, 64, 2, 4, jnp.bfloat16), (image,)),
        (Bert(BertConfig(layers=2, width=64, heads=4, hidden=256), jnp.bfloat16), (text, text == 0)),
    ]
    for model, inputs in towers:
        made = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        loss = lambda params, rest: jnp.sum(model.apply({**rest, "params": params}, *inputs))
        rest = {name: tree for name, tree in made.items() if name != "params"}
        total = counted(jax.grad(loss), made["params"], rest)
        assert total["bfloat16"] > 0.9 * total.total()


def test_rates_of_devices_that_are_known_and_of_others():
    assert flops.rates(989e12, 2.0, "NVIDIA H100 80GB HBM3") == {"flops_per_second": 494.5e12, "mfu": 0.5}
    assert flops.rates(1e9, 2.0, "cpu") == {"flops_per_second": 0.5e9}


def test_metrics_that_older_steps_lack_are_those_of_the_others():
    steps = [{"loss": np.float32(3)}, {"loss": np.float32(1), "truncated": np.float32(0.5)}]
    assert metrics.average(steps) == {"train/loss": 2.0, "train/truncated": 0.5}


def test_a_stopwatch_divides_by_the_time_that_passed(monkeypatch):
    times = iter([10.0, 11.0, 12.0, 13.0, 13.5, 14.0, 15.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    watch = Stopwatch(pairs=8)  # at 10
    batches = iter("ab")
    assert watch.next(batches) == "a" and watch.next(batches) == "b"  # 11 to 12, 13 to 13.5
    assert watch.lap(step_flops=100) == {  # at 14
        "train/pairs_per_second": 16 / 4,
        "train/waiting_for_data": 1.5 / 4,
        "train/flops_per_second": 200 / 4,
    }
    assert watch.steps == 0 and watch.started == 15.0


@pytest.fixture
def step(variables):  # noqa: F811
    state, fixed = start(config_of(), variables, 4)
    return TrainStep({}, **fixed), state, fixed


def test_a_step_takes_its_state_over_and_is_traced_once(step, monkeypatch):
    update, state, fixed = step
    traces = []
    monkeypatch.setattr("zslflax.step.gradients", lambda *args, f=gradients: traces.append(1) or f(*args))
    batches = [distributed.shard(batch_of(i)) for i in range(2)]
    before = jax.tree.leaves(state)
    for batch in batches:
        state, _ = update(state, batch)
    assert all(leaf.is_deleted() for leaf in before) and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert len(traces) == 1
    plan = update.mapped.lower(state, {}, batches[0]).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    alone = jax.make_jaxpr(functools.partial(train_step, **fixed), axis_env=[(AXIS, 4)])
    assert update.flops == flops.count(alone(state, {}, {k: x[0] for k, x in batches[0].items()}).jaxpr).total() > 0


def test_batches_are_on_the_devices_before_they_are_asked_for():
    drawn = []

    def source():
        for i in range(4):
            drawn.append(i)
            yield {"image": np.full(8, i), "errors": ("none",)}

    batches = distributed.to_devices(source(), size=2)
    arrays, errors = next(batches)
    assert drawn == [0, 1] and errors == ("none",)
    assert len(arrays["image"].sharding.device_set) == 4 and arrays["image"].shape == (4, 2)
    assert [int(arrays["image"][0, 0]) for arrays, _ in batches] == [1, 2, 3]


def test_compiled_steps_are_cached_unless_the_config_says_otherwise(tmp_path):
    assert default_config().compilation_cache
    before = jax.config.jax_compilation_cache_dir
    try:
        distributed.start(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


class Handle:
    """Stands for what is on the devices; nothing but a step, a report or a save may look inside."""

    def __init__(self, value):
        self.value = value


def test_between_reports_nothing_waits_for_the_devices(tiny, tmp_path, monkeypatch):
    """State and metrics go from step to step in handles that only those functions open that are meant to wait."""
    tiny.eval.sets.test.data, tiny.log_every = "", 3
    opened = []
    called, average, save = TrainStep.__call__, metrics.average, checkpoint.save

    def look(handle):
        return handle.value if isinstance(handle, Handle) else handle

    def step(self, state, batch):
        return tuple(map(Handle, called(self, look(state), batch)))

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(
        training, "average", lambda recent: opened.append(len(recent)) or average(list(map(look, recent)))
    )
    monkeypatch.setattr(training, "evaluate_train_state", lambda *args: {})
    monkeypatch.setattr(
        checkpoint, "save", lambda manager, state, *args, **kwargs: save(manager, look(state), *args, **kwargs)
    )
    monkeypatch.setattr(Handle, "failed_step", property(lambda self: self.value.failed_step), raising=False)
    loop.train(tiny, tmp_path)
    assert opened == [3, 3]


def events(folder):
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_run_writes_a_trace_of_the_steps_that_it_is_told_to(tiny, tmp_path, caplog, monkeypatch):
    tiny.profile_steps, tiny.steps, tiny.eval.sets.test.data = "2:3", 4, ""
    monkeypatch.setattr(logging.getLogger("zslflax"), "propagate", True)
    with caplog.at_level("INFO", "zslflax"):
        loop.train(tiny, tmp_path)
    found = events(tmp_path / "profile")
    assert [event["args"]["step_num"] for event in found if event.get("name") == "train_step"] == ["2", "3"]
    assert any("dot" in event.get("name", "") for event in found)  # the devices' own operations
    assert "a trace of steps 2 to 3 is in" in caplog.text and "xprof" in caplog.text
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/flops_per_second"] > 0 and "train/mfu" not in last  # of a CPU no peak is known


def test_a_trace_ends_with_the_run_that_fails_in_the_middle_of_it(tmp_path):
    with pytest.raises(ZeroDivisionError), contextlib.closing(Profile((2, 9), tmp_path)) as profile:
        profile.step(1, jnp.sin, 1.0)
        profile.step(5, jnp.sin, 1.0)  # a run that went on there
        profile.step(6, lambda: 1 / 0)
    assert [event["args"]["step_num"] for event in events(tmp_path) if event.get("name") == "train_step"] == ["5", "6"]
    with contextlib.closing(Profile((1, 1), tmp_path / "next")) as profile:
        profile.step(1, jnp.sin, 1.0)
    assert events(tmp_path / "next")


def test_steps_to_profile():
    c = default_config()
    assert profiled_steps(c) is None
    c.profile_steps = "100:105"
    assert profiled_steps(c) == (100, 105)
