"""The group code as Mosaic kernels: tiles of 128 tokens are turned, so that a group lies along sublanes.

Along sublanes the range of a group, its halves and its codes are cut without moving lanes. `low` and `step`
lie `[columns, groups, tokens]` for the kernels, which fills no lanes in vain. A last axis that is no multiple
of 256, or whose groups are not 64 or 128 wide, takes the reference.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from peftjax.kernels.packed_residuals import affine, reference

TOKENS = 128
CHUNK = 256
"""Values of a token that are turned at once: their codes fill 128 lanes."""
WIDEST = 2048
"""Of a block: 1 MiB of float32."""


def quantize(x: Array, *, group: int, fine: bool, interpret: bool = False) -> list[Array]:
    """`reference.quantize`."""
    width = x.shape[-1]
    if not _fits(width, group):
        return reference.quantize(x, group=group, fine=fine)
    flat, n = _tokens(x)
    block = _block(width)
    packed = jax.ShapeDtypeStruct((flat.shape[0], width // 2), jnp.uint8)
    number = jax.ShapeDtypeStruct((width // block, block // group, flat.shape[0]), jnp.bfloat16)
    out = pl.pallas_call(
        partial(_quantize, group),
        grid=(flat.shape[0] // TOKENS, width // block),
        in_specs=[_values(block)],
        out_specs=[_values(block // 2), *[_numbers(block // group)] * 2, *[_values(block // 2)] * fine],
        out_shape=[packed, number, number, *[packed] * fine],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="packed_residuals_quantize",
    )(flat)
    codes, low, step, *rest = out
    lead = x.shape[:-1]
    low, step = (part.transpose(2, 0, 1)[:n].reshape(*lead, -1) for part in (low, step))
    return [codes[:n].reshape(*lead, -1), low, step, *(part[:n].reshape(*lead, -1) for part in rest)]


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
    group = width // low.shape[-1]
    if codes.shape[-1] * 2 != width or not _fits(width, group):
        return reference.dequantize(codes, low, step, fine, width=width, dtype=dtype)
    packed = [_tokens(part)[0] for part in (codes, fine) if part is not None]
    block, rows = _block(width), packed[0].shape[0]
    numbers = [_tokens(part)[0].reshape(rows, width // block, -1).transpose(1, 2, 0) for part in (low, step)]
    (out,) = pl.pallas_call(
        partial(_dequantize, group),
        grid=(rows // TOKENS, width // block),
        in_specs=[*[_numbers(block // group)] * 2, *[_values(block // 2)] * len(packed)],
        out_specs=[_values(block)],
        out_shape=[jax.ShapeDtypeStruct((rows, width), dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="packed_residuals_dequantize",
    )(*numbers, *packed)
    lead = codes.shape[:-1]
    return [out[: low.size // low.shape[-1]].reshape(*lead, width)]


def _fits(width: int, group: int) -> bool:
    return width % CHUNK == 0 and group in (64, 128)


def _block(width: int) -> int:
    """The widest block that divides the last axis."""
    return max(block for block in range(CHUNK, WIDEST + 1, CHUNK) if width % block == 0)


def _tokens(x: Array) -> tuple[Array, int]:
    """All axes but the last as one, filled up to whole tiles, and its true length."""
    flat = x.reshape(-1, x.shape[-1])
    n = flat.shape[0]
    return jnp.pad(flat, ((0, -n % TOKENS), (0, 0))), n


def _values(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((TOKENS, width), lambda row, column: (row, column))


def _numbers(groups: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, groups, TOKENS), lambda row, column: (column, 0, row))


def _quantize(group: int, x: Any, codes: Any, low: Any, step: Any, *fine: Any) -> None:
    per_chunk = CHUNK // group
    for chunk in range(x.shape[1] // CHUNK):
        a = x[:, chunk * CHUNK : (chunk + 1) * CHUNK].astype(jnp.float32).T.reshape(per_chunk, group, TOKENS)
        start, length = affine.limits(jnp.min(a, 1, keepdims=True), jnp.max(a, 1, keepdims=True))
        here = slice(chunk * per_chunk, (chunk + 1) * per_chunk)
        low[here], step[here] = (part[:, 0].astype(jnp.bfloat16) for part in (start, length))
        c, rest = affine.coarse(a, start, length)
        _store(codes, chunk, c)
        if fine:
            _store(fine[0], chunk, affine.fine(rest))


def _store(ref: Any, chunk: int, codes: Array) -> None:
    half = codes.shape[1] // 2
    packed = (codes[:, :half] | (codes[:, half:] << 4)).reshape(CHUNK // 2, TOKENS)
    ref[:, chunk * CHUNK // 2 : (chunk + 1) * CHUNK // 2] = packed.T.astype(jnp.uint8)


def _dequantize(group: int, low: Any, step: Any, codes: Any, *rest: Any) -> None:
    *fine, out = rest
    per_chunk = CHUNK // group
    for chunk in range(out.shape[1] // CHUNK):
        here = slice(chunk * per_chunk, (chunk + 1) * per_chunk)
        start, length = (ref[here].astype(jnp.float32)[:, None] for ref in (low, step))
        c, *f = (_load(ref, chunk, per_chunk) for ref in (codes, *fine))
        value = affine.value(c, f[0] if f else None, start, length)
        turned = value.reshape(CHUNK, TOKENS).T
        out[:, chunk * CHUNK : (chunk + 1) * CHUNK] = turned.astype(out.dtype)


def _load(ref: Any, chunk: int, per_chunk: int) -> Array:
    packed = ref[:, chunk * CHUNK // 2 : (chunk + 1) * CHUNK // 2].astype(jnp.int32).T
    packed = packed.reshape(per_chunk, -1, TOKENS)
    return jnp.concatenate([packed & 15, packed >> 4], axis=1)
