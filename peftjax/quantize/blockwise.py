"""An array as one byte per number and a scale per block of numbers.

Dettmers et al., ICLR 2022, arXiv 2110.02861. With the blocks B of an array x and the dynamic map v,

    scale_B = the number of x in B that is largest in size, with its sign     code_i = nearest(x_i / scale_B)
    x_i ≈ scale_B v(code_i)

The release's scale has no sign. With it the largest number of a block is always the map's 1, which has no
negative: it is kept exactly, and encoding a decoded array gives the same codes and scales.

Codes have the array's shape, scales `[..., blocks]`: both shard as the array does. A last axis shorter than
`block_size / 4` is read together with as many axes before it as are needed, since a scale for each short row
would take more than a quarter of the codes' memory. Where those axes are sharded, blocks span shards, and
encoding moves numbers between devices. `block_length` says how an axis is cut.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from peftjax.core.errors import PeftError
from peftjax.quantize.codes import Codes
from peftjax.quantize.dynamic_map import decode_unit, encode_unit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockwiseCodes(Codes):
    """A coded float32 array.

    Attributes:
        codes: uint8, the array's shape.
        scales: float32, `[*shape[:-merged], blocks]`; zero for a block of zeros, and of sizes below the least
            normal float32.
        signed: which map.
        block: numbers per block.
        merged: how many of the last axes are read as one.
    """

    codes: UInt8[Array, "*shape"]
    scales: Float[Array, "*lead blocks"]
    signed: bool = field(metadata={"static": True})
    block: int = field(metadata={"static": True})
    merged: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        """float32, what it decodes to."""
        return np.dtype(np.float32)

    def decode(self) -> Float[Array, "*shape"]:
        """The array, float32."""
        codes = _in_blocks(self.codes, self.merged, self.block)
        values = decode_unit(codes, self.signed) * self.scales[..., None]
        return _from_blocks(values, self.codes.shape, self.merged)


def encode(
    x: Float[Array, "*shape"],
    *,
    signed: bool,
    block_size: int = 256,
    noise: Float[Array, "*shape"] | None = None,
) -> BlockwiseCodes:
    """Code an array; a block with a NaN or an infinity decodes to NaN.

    Args:
        x: any floating dtype, with at least one axis.
        signed: False for what is never negative (a negative number becomes zero).
        block_size: the most numbers per scale, at least 2.
        noise: uniform in [0, 1): rounds stochastically.

    Raises:
        PeftError: the array has no axis, or block_size is less than 2.
    """
    if block_size < 2:
        raise PeftError(f"encode: block_size must be at least 2, got {block_size}")
    if not x.shape:
        raise PeftError("encode: a scalar has no blocks; give an array with at least one axis")
    merged = merged_axes(x.shape, block_size)
    block = block_length(math.prod(x.shape[-merged:]), block_size)
    return _encoded(x, signed, block, merged, noise)


def encode_like(x: Float[Array, "*shape"], like: BlockwiseCodes) -> BlockwiseCodes:
    """Code an array with the map and the blocks that another of its shape has, to the nearest."""
    return _encoded(x, like.signed, like.block, like.merged, None)


def _encoded(x: Array, signed: bool, block: int, merged: int, noise: Array | None) -> BlockwiseCodes:
    blocks = _in_blocks(x.astype(jnp.float32), merged, block)
    scales = _scales(blocks, signed)
    empty = scales[..., None] == 0
    unit = jnp.where(empty, 0.0, blocks / jnp.where(empty, 1.0, scales[..., None]))
    noise = None if noise is None else _in_blocks(noise, merged, block)
    codes = _from_blocks(encode_unit(unit, signed, noise), x.shape, merged)
    return BlockwiseCodes(codes, scales, signed, block, merged)


def merged_axes(shape: tuple[int, ...], block_size: int) -> int:
    """How many of the last axes make rows of at least a quarter of a block, or all."""
    for merged in range(1, len(shape)):
        if 4 * math.prod(shape[-merged:]) >= block_size:
            return merged
    return len(shape)


def block_length(n: int, block_size: int) -> int:
    """Numbers per block of a row of n: equal blocks where n allows, which sharding the row does not cut.

    Of the lengths between half of `block_size` and all of it that divide n, that with the most factors of two
    in the number of blocks (256 of 4096, 172 of 11008); else `block_size`, and the last block is shorter.
    """
    if n <= block_size:
        return max(n, 1)
    even = [b for b in range(block_size // 2 + 1, block_size + 1) if n % b == 0]
    return max(even, key=lambda b: (_factors_of_two(n // b), b), default=block_size)


def _factors_of_two(n: int) -> int:
    return n & -n


def _scales(blocks: Float[Array, "*lead blocks block"], signed: bool) -> Float[Array, "*lead blocks"]:
    greatest = blocks.max(-1)
    if signed:
        least = blocks.min(-1)
        greatest = jnp.where(greatest >= -least, greatest, least)
    # Division by a subnormal is not the same everywhere. NaN is not smaller than anything: it stays.
    return jnp.where(jnp.abs(greatest) < jnp.finfo(jnp.float32).tiny, 0.0, greatest)


def _in_blocks(x: Array, merged: int, block: int) -> Array:
    """`[*lead, blocks, block]`, the last block filled up with zeros."""
    rows = x.reshape(*x.shape[: x.ndim - merged], math.prod(x.shape[x.ndim - merged :]))
    short = -rows.shape[-1] % block
    if short:
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // block, block)


def _from_blocks(blocks: Array, shape: tuple[int, ...], merged: int) -> Array:
    rows = blocks.reshape(*blocks.shape[:-2], math.prod(blocks.shape[-2:]))
    return rows[..., : math.prod(shape[len(shape) - merged :])].reshape(shape)
