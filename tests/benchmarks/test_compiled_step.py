"""The traffic that benchmarks/compiled_step.py reads from compiled programs, against arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from tests.testing.benchmarks import imported

X = jnp.ones((128, 256))
BYTES = 4 * X.size


@pytest.fixture(scope="module")
def compiled_step():
    with imported("compiled_step") as (compiled_step,):
        yield compiled_step


def traffic(compiled_step, function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return sum(size for _, _, size in compiled_step.kernels(text))


def test_a_fused_kernel_reads_each_array_once_and_writes_its_result(compiled_step):
    function = lambda x, y: jnp.tanh(x) * x + y
    assert traffic(compiled_step, function, X, X + 1) == 3 * BYTES
    assert traffic(compiled_step, lambda x: function(x, x), X) == 2 * BYTES


def test_kernels_of_many_arrays_count_them_all(compiled_step):
    many = [X + i for i in range(8)]
    assert traffic(compiled_step, lambda *arrays: [jnp.tanh(x) for x in arrays], *many) == 2 * 8 * BYTES


def test_products_count_with_their_operands(compiled_step):
    x, y = jnp.ones((64, 256)), jnp.ones((256, 32))
    # Eigen's product may need one operand copied first.
    assert 4 * (64 * 256 + 256 * 32 + 64 * 32) <= traffic(compiled_step, jnp.matmul, x, y) < 4 * 3 * 64 * 256


def test_the_body_of_a_loop_counts_as_often_as_it_runs(compiled_step):
    loop = lambda n: lambda x: jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y) + 1, x)
    few, many = (traffic(compiled_step, loop(n), X) for n in (50, 150))
    assert many - few == pytest.approx(100 * 2 * BYTES, rel=1e-3)


def test_groups_name_tower_pass_and_kind(compiled_step):
    path = "jit(train_step)/{}(TwoTower.image_features))/tower/layer1_0/bn3/reduce_sum"
    group = compiled_step.group
    assert group("input_reduce_fusion.3", path.format("transpose(jvp")) == "image backward reduce"
    assert group("loop_add_fusion", path.format("jvp(")) == "image student elementwise"
    assert group("cudnn-conv.5", "jit(train_step)/TwoTower.image_features/ResNet/conv1") == "image teacher library"
    assert group("loop_select_fusion", "") == "other student elementwise"
