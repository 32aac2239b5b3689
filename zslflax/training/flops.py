"""Floating-point operations of a traced function, and the devices' peak rates: for the utilisation of the hardware.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and on GPUs leaves out products that
become library calls. The train step computes its loss and its micro-batches in loops, so the jaxpr is counted instead.
"""

import collections
import math
from typing import Any

from jax.extend.core import jaxprs_in_params

# Dense products in bf16, FLOP/s of one device, by its `device_kind`.
PEAKS = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4, and so on
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    # NVIDIA's data sheets; half of the figure with sparsity where only that is given.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def count(jaxpr: Any) -> collections.Counter[str]:
    """FLOPs of all matrix products and convolutions in a jaxpr, by the type of their operands ("bfloat16", …).

    The body of a scan counts as often as it runs. Every branch, and the body of a loop of unknown length, counts once.
    What is computed again (`remat`, chunks, micro-batches) counts again.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros((3, 3))
    >>> count(jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x))(x).jaxpr)  # 5 · 2 · 3³
    Counter({'float32': 270})
    """
    total: collections.Counter[str] = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            total[str(eqn.invars[0].aval.dtype)] += product_flops(eqn)
        for inner in jaxprs_in_params(eqn.params):
            runs = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total.update({kind: runs * flops for kind, flops in count(inner).items()})
    return total


def product_flops(eqn: Any) -> int:
    """FLOPs of a matrix product or a convolution: two for each multiplication."""
    left, right = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
    spec = eqn.params["dimension_numbers"].rhs_spec  # (out, in, *space)
    window = [right.shape[axis] for axis in spec[1:]]
    # The zeros that a strided convolution's gradient puts between its inputs are no work.
    return 2 * out.size * math.prod(window) // math.prod(eqn.params["lhs_dilation"])


def rates(flops: float, seconds: float, device_kind: str) -> dict[str, float]:
    """FLOP/s of one device, and as `mfu` their share of its peak where that is known.

    `mfu` is the share of the dense bf16 peak, whatever the type of the operands. It includes what `remat`, chunks and
    micro-batches compute again, so that it is what some call the hardware FLOPs utilisation.

    Args:
        flops: what the device computed.
        seconds: in this time.
        device_kind: the device's `device_kind`.

    >>> rates(98.9e12, seconds=0.5, device_kind="NVIDIA H200")
    {'flops_per_second': 197800000000000.0, 'mfu': 0.2}
    """
    rate = flops / seconds
    known = {"mfu": rate / PEAKS[device_kind]} if device_kind in PEAKS else {}
    return {"flops_per_second": rate} | known
