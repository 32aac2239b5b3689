"""The text tower on packed captions, against the same captions in padded rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.captions import TOKENS, padded
from zslflax.data import packing
from zslflax.models.bert import Bert, BertConfig

KINDS = {
    "BERT": BertConfig(50, 16, 2, 2, 32, positions=TOKENS, dropout=0.0),
    "RoBERTa": BertConfig(50, 16, 2, 2, 32, positions=TOKENS + 2, first_position=2, types=1, dropout=0.0),
    "MPNet": BertConfig(50, 16, 2, 2, 32, positions=TOKENS, types=0, buckets=8, dropout=0.0),
    "CLIP": BertConfig(
        *(50, 16, 2, 2, 32, TOKENS),
        *(0, 0, 1e-5, 0.0),
        pool="last",
        pre_norm=True,
        causal=True,
        embedding_norm=False,
    ),
    "ModernBERT": BertConfig(
        *(50, 16, 2, 2, 32, TOKENS),
        *(0, 0, 1e-5, 0.0),
        pre_norm=True,
        rotary=((1e4, 0), (1e2, 2)),
        gated=True,
        use_bias=False,
        norm_bias=False,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def tower(request):
    model = Bert(KINDS[request.param])
    variables = jax.jit(model.init)(jax.random.key(0), *padded([4]))
    # With larger parameters, wrong positions or types change the outputs much more than the tolerance.
    return model, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)


LENGTHS = [12, 1, 0, 7, 12, 3, 1, 9, 5, 2, 11, 4, 6, 0, 8, 10]


def packed_inputs(lengths, rows=5, width=32):
    packed = packing.pack(*padded(lengths), rows, width)
    return tuple(packed[name] for name in ("text", "text_segment", "text_position"))


def test_the_tower_gives_the_outputs_of_padded_rows(tower):
    model, variables = tower
    wanted = jax.jit(model.apply)(variables, *padded(LENGTHS))
    run = jax.jit(lambda variables, *x: model.apply(variables, *x, len(LENGTHS), method="packed"))
    outputs = run(variables, *packed_inputs(LENGTHS))
    assert outputs.dtype == jnp.float32 and np.std(wanted, axis=0).min() > 0.05
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-5)
    assert not np.asarray(outputs)[[2, 13]].any()


def test_the_tower_gives_the_gradients_of_padded_rows(tower):
    model, variables = tower
    weight = np.random.default_rng(1).normal(size=(len(LENGTHS), 16)).astype(np.float32)
    plain = lambda v: jnp.sum(weight * model.apply(v, *padded(LENGTHS)))
    inputs = packed_inputs(LENGTHS)
    packed = lambda v: jnp.sum(weight * model.apply(v, *inputs, len(LENGTHS), method="packed"))
    wanted, grads = (jax.jit(jax.grad(f))(variables) for f in (plain, packed))

    def close(a, b):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1.0))

    jax.tree.map(close, grads, wanted)


def test_a_text_does_not_depend_on_its_neighbours_or_padding(tower):
    """The output of a text stays the same when every other token changes, including padding."""
    model, variables = tower
    text, segment, position = packed_inputs(LENGTHS)
    run = jax.jit(lambda text: model.apply(variables, text, segment, position, len(LENGTHS), method="packed"))
    others = np.where(segment == 8, text, (text + 7) % 50).astype(np.int32)
    before, after = run(text), run(others)
    np.testing.assert_array_equal(before[7], after[7])
    assert np.abs(before - after).max(axis=1)[[0, 1, 3]].min() > 1e-3


def test_packed_rows_are_as_exact_as_padded_rows_in_bfloat16(tower):
    model, variables = tower
    bf16 = Bert(model.config, jnp.bfloat16)
    wanted = jax.jit(model.apply)(variables, *padded(LENGTHS))
    apply = lambda *x: bf16.apply(variables, *x, len(LENGTHS), method="packed")
    outputs = jax.jit(apply)(*packed_inputs(LENGTHS))
    assert outputs.dtype == jnp.float32
    plain = jax.jit(bf16.apply)(variables, *padded(LENGTHS))
    error = lambda x: float(jnp.linalg.norm(x - wanted) / jnp.linalg.norm(wanted))
    assert error(outputs) < 0.02 and error(outputs) < 1.5 * error(plain)


def test_dropout_applies_to_packed_rows_in_training():
    model = Bert(BertConfig(50, 16, 1, 2, 32, positions=TOKENS, dropout=0.5))
    variables = jax.jit(model.init)(jax.random.key(0), *padded([4]))
    run = lambda key, train=True: model.apply(
        variables, *packed_inputs(LENGTHS), len(LENGTHS), train=train, method="packed", rngs={"dropout": key}
    )
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2 and not np.asarray(first)[2].any()
