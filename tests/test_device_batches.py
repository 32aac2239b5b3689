"""Functions applied to many rows on the devices, also where their memory does not suffice."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from zslflax import distributed
from zslflax.device_batches import MappedFunction, map_method
from zslflax.errors import DeviceMemoryError


@pytest.mark.parametrize("total", [1, 7, 8, 9])
def test_a_function_is_applied_in_batches_of_one_shape(total):
    shapes = []

    def double(scale, arrays):
        shapes.append(arrays["x"].shape)
        return scale * arrays["x"] + arrays["y"][:, None]

    arrays = {"x": np.arange(3.0 * total, dtype=np.float32).reshape(total, 3), "y": np.arange(total)}
    output = MappedFunction(double).in_batches(distributed.replicate(jnp.float32(2.0)), arrays, size=8)
    np.testing.assert_array_equal(output, 2 * arrays["x"] + arrays["y"][:, None])
    assert set(shapes) == {(2, 3)}


def test_equal_models_share_what_is_compiled():
    traced = []

    class Scale(nn.Module):
        factor: float

        def scaled(self, x):
            traced.append(self.factor)
            return self.factor * x

    x = np.arange(8.0, dtype=np.float32)
    for factor in (2.0, 2.0, 3.0):
        output = map_method(Scale(factor), "scaled").in_batches({}, (x,), size=8)
        np.testing.assert_array_equal(output, factor * x)
    assert traced == [2.0, 3.0]


def needs_memory_above(rows: int) -> MappedFunction:
    """The identity, whose output has 2⁴⁷ numbers more per row in batches of more than some rows for each device."""
    return MappedFunction(lambda _, x: jnp.broadcast_to(x[:, None], (len(x), 1 if len(x) <= rows else 1 << 47)))


def test_batches_that_do_not_fit_into_the_memory_are_halved(caplog):
    function, x = needs_memory_above(rows=2), np.arange(37, dtype=np.float32)
    for _ in range(2):  # the second time with batches that are known to fit
        np.testing.assert_array_equal(function.in_batches(None, x, size=40), x[:, None])
    logged = [f"batches of {a} do not fit into the devices' memory: going on with {b}" for a, b in ((40, 20), (20, 8))]
    assert caplog.messages == logged


def test_a_row_that_does_not_fit_into_the_memory_is_an_error():
    with pytest.raises(DeviceMemoryError, match=r"memory does not suffice \(.*\): not even one row at a time fits"):
        needs_memory_above(rows=0).in_batches(None, np.arange(9.0), size=8)


def test_another_error_of_the_function_is_raised_as_it_is():
    def wrong(_, x):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="^wrong"):
        MappedFunction(wrong).in_batches(None, np.arange(9.0), size=8)
