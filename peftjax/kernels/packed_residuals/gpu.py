"""The group code as Triton kernels: a program takes some groups, of any rows, and keeps them in registers.

The groups of an array are one axis, as they lie in memory, and the halves of each are two loads. Groups whose
half is no power of two take the reference.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from peftjax.kernels.packed_residuals import affine, layout, reference

BLOCK = 64
"""Groups of a program: 4096 values in groups of 64."""


def quantize(x: Array, *, group: int, fine: bool, interpret: bool = False) -> list[Array]:
    """`reference.quantize`."""
    count, size = layout.groups_of(x.shape[-1], group)
    half = size // 2
    if not _fits(half):
        return reference.quantize(x, group=group, fine=fine)
    a = layout.grouped(x, group).reshape(-1, size)
    n = a.shape[0]
    packed, number = jax.ShapeDtypeStruct((n, half), jnp.uint8), jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    shapes = [packed, number, number, *([packed] if fine else [])]
    out = _call(partial(_quantize, n), [a], shapes, "quantize", interpret)
    lead = x.shape[:-1]
    return [part.reshape(*lead, count * half if part.ndim == 2 else count) for part in out]


def dequantize(
    codes: Array,
    low: Array,
    step: Array,
    fine: Array | None = None,
    *,
    width: int,
    dtype: DTypeLike,
    interpret: bool = False,
) -> list[Array]:
    """`reference.dequantize`."""
    count = low.shape[-1]
    half = codes.shape[-1] // count
    if not _fits(half):
        return reference.dequantize(codes, low, step, fine, width=width, dtype=dtype)
    packed = [part.reshape(-1, half) for part in (codes, fine) if part is not None]
    given = [low.reshape(-1), step.reshape(-1), *packed]
    n = given[0].shape[0]
    shape = jax.ShapeDtypeStruct((n, 2 * half), dtype)
    (out,) = _call(partial(_dequantize, n), given, [shape], "dequantize", interpret)
    return [layout.ungrouped(out.reshape(*codes.shape[:-1], count, 2 * half), width)]


def _fits(half: int) -> bool:
    return half >= 16 and half & (half - 1) == 0


def _call(body: Any, given: list[Array], shapes: list[Any], name: str, interpret: bool) -> list[Array]:
    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda at: (0,) * len(x.shape))

    return pl.pallas_call(
        body,
        grid=(pl.cdiv(shapes[0].shape[0], BLOCK),),
        in_specs=[whole(x) for x in given],
        out_specs=[whole(x) for x in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=f"packed_residuals_{name}",
    )(*given)


def _mine(n: int) -> tuple[Any, Array]:
    """The groups of this program, and which of them exist."""
    start = pl.program_id(0) * BLOCK
    return pl.ds(start, BLOCK), start + jnp.arange(BLOCK) < n


def _quantize(n: int, x: Any, codes: Any, low: Any, step: Any, *fine: Any) -> None:
    mine, exists = _mine(n)
    a = [
        plgpu.load(x.at[mine, part], mask=exists[:, None], other=0.0).astype(jnp.float32)
        for part in _halves(x)
    ]
    smallest = jnp.minimum(jnp.min(a[0], 1), jnp.min(a[1], 1))
    largest = jnp.maximum(jnp.max(a[0], 1), jnp.max(a[1], 1))
    start, length = affine.limits(smallest, largest)
    plgpu.store(low.at[mine], start.astype(jnp.bfloat16), mask=exists)
    plgpu.store(step.at[mine], length.astype(jnp.bfloat16), mask=exists)
    found = [affine.coarse(part, start[:, None], length[:, None]) for part in a]
    _store(codes, mine, exists, *(c for c, _ in found))
    if fine:
        _store(fine[0], mine, exists, *(affine.fine(rest) for _, rest in found))


def _store(ref: Any, mine: Any, exists: Array, first: Array, second: Array) -> None:
    packed = (first | (second << 4)).astype(jnp.uint8)
    plgpu.store(ref.at[mine, :], packed, mask=exists[:, None])


def _dequantize(n: int, low: Any, step: Any, codes: Any, *rest: Any) -> None:
    mine, exists = _mine(n)
    *fine, out = rest
    start, length = (
        plgpu.load(ref.at[mine], mask=exists, other=0.0).astype(jnp.float32)[:, None] for ref in (low, step)
    )
    packed = [
        plgpu.load(ref.at[mine, :], mask=exists[:, None], other=0).astype(jnp.int32) for ref in (codes, *fine)
    ]
    for part, shift in zip(_halves(out), (0, 4)):
        c, *f = ((bytes >> shift) & 15 for bytes in packed)
        value = affine.value(c, f[0] if f else None, start, length)
        plgpu.store(out.at[mine, part], value.astype(out.dtype), mask=exists[:, None])


def _halves(ref: Any) -> tuple[Any, Any]:
    half = ref.shape[1] // 2
    return pl.ds(0, half), pl.ds(half, half)
