"""The group code as two operations: kernels on a TPU and on an NVIDIA GPU, in a program for one device or in
a device's own code; jnp elsewhere, and wherever XLA partitions the program.
"""

from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.typing import DTypeLike

from peftjax.core import primitives
from peftjax.kernels.packed_residuals import gpu, reference, tpu


def quantize(x: Array, noise: Array | None = None, *, group: int, fine: bool) -> list[Array]:
    """As `reference.quantize`, which it is with noise."""
    if noise is not None:
        return reference.quantize(x, noise, group=group, fine=fine)
    body = reference.quantize if _explicit(x) else _quantize
    return body(x, group=group, fine=fine)


def dequantize(
    codes: Array, low: Array, step: Array, fine: Array | None = None, *, width: int, dtype: DTypeLike
) -> Array:
    """As `reference.dequantize`."""
    operands = (codes, low, step, *([] if fine is None else [fine]))
    body = reference.dequantize if _explicit(codes) else _dequantize
    return body(*operands, width=width, dtype=dtype)[0]


def _explicit(x: Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _operation(name: str) -> Any:
    kernels = {"cuda": getattr(gpu, name), "tpu": getattr(tpu, name)}
    return primitives.by_platform(f"packed_residuals_{name}", getattr(reference, name), kernels)


_quantize = _operation("quantize")
_dequantize = _operation("dequantize")
