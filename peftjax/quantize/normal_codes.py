"""Matrices of few bits, as codes of a normal number with the matrix's own mean and deviation.

    ŵ = c_k σ + μ,    k the code nearest to (w - μ) / (σ + ε),    ε = 1e-5

A matrix has one mean μ and one deviation σ, the unbiased one. The table c is optimal for the absolute error
of N(0, 1): each value is the median of its cell, and the edges of the cells lie halfway between two values
(Jie et al., ICCV 2023, arXiv 2307.16867).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from peftjax.core.derivatives import with_backward
from peftjax.quantize.codes import Codes
from peftjax.quantize.packing import pack, unpack

EPSILON = 1e-5
"""What is added to the deviation where it divides."""


@functools.cache
def median_table(bits: int) -> tuple[float, ...]:
    """The `2^bits` values, of which each is the median of a normal number within its cell."""
    normal, count = NormalDist(), 2**bits
    values = [normal.inv_cdf((n + 0.5) / count) for n in range(count)]
    for _ in range(100_000):
        edges = [(low + high) / 2 for low, high in itertools.pairwise(values)]
        below = [0.0, *map(normal.cdf, edges), 1.0]
        found = [normal.inv_cdf((low + high) / 2) for low, high in itertools.pairwise(below)]
        # Of equal sizes on both sides, to the last bit.
        found = [(value - other) / 2 for value, other in zip(found, found[::-1])]
        moved, values = max(abs(new - old) for new, old in zip(found, values)), found
        if moved < 1e-15:
            break
    return tuple(values)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "mean", "deviation"],
    meta_fields=["bits", "matrix", "dtype"],
)
@dataclass(frozen=True)
class NormalCodes(Codes):
    """An array `[*stack, *matrix]` as codes, each matrix of the stack for itself.

    Attributes:
        codes: uint8 `[*stack, bytes]`, those of a matrix in row-major order, the first in a byte's low bits.
        mean: μ, float32 `[*stack]`.
        deviation: σ, float32 `[*stack]`.
        bits: of a code.
        matrix: the axes of a matrix.
        dtype: what it decodes to.
    """

    codes: UInt8[Array, "*stack bytes"]
    mean: Float[Array, "*stack"]
    deviation: Float[Array, "*stack"]
    bits: int
    matrix: tuple[int, ...]
    dtype: DTypeLike

    @property
    def shape(self) -> tuple[int, ...]:
        """`[*stack, *matrix]`."""
        return (*self.codes.shape[:-1], *self.matrix)

    def decode(self) -> Array:
        """The array that the codes stand for."""
        codes = _unpack_low_first(self.codes, self.bits, math.prod(self.matrix)).reshape(self.shape)
        axes = tuple(range(self.mean.ndim, codes.ndim))
        mean, deviation = (jnp.expand_dims(part, axes) for part in (self.mean, self.deviation))
        return _values(codes, mean, deviation, self.bits).astype(self.dtype)


def encode_normal(
    w: Float[Array, "*stack_and_matrix"], stack: int, bits: int, *, dtype: DTypeLike | None = None
) -> NormalCodes:
    """Code each matrix of an array; a number on an edge takes the lower code.

    Args:
        w: float32.
        stack: how many of its first axes are a stack of matrices.
        bits: of a code.
        dtype: what it decodes to; by default that of `w`.
    """
    codes, mean, deviation = _coded(w, stack, bits)
    packed = _pack_low_first(codes.reshape(*w.shape[:stack], -1), bits)
    mean, deviation = (part.reshape(w.shape[:stack]) for part in (mean, deviation))
    return NormalCodes(packed, mean, deviation, bits, w.shape[stack:], dtype or w.dtype)


def round_normal(w: Float[Array, "*stack_and_matrix"], stack: int, bits: int) -> Array:
    """What `encode_normal` would decode to, with the straight-through gradient, which keeps `w` alone.

    A code counts as its number in units of the deviation, of which μ and σ are differentiated:

        dw = k g + (1 - k) mean(g) + Σ g (c - k z) · (w - μ) / ((n - 1) σ),    k = σ / (σ + ε)

    with g = dŵ and z = (w - μ) / (σ + ε). The arguments are those of `encode_normal`.
    """

    def value(w: Array) -> Array:
        codes, mean, deviation = _coded(w, stack, bits)
        return _values(codes, mean, deviation, bits).astype(w.dtype)

    def backward(w: Array, g: Array) -> tuple[Array]:
        codes, mean, deviation = _coded(w, stack, bits)
        axes = tuple(range(stack, w.ndim))
        g, centered = g.astype(jnp.float32), w.astype(jnp.float32) - mean
        share = deviation / (deviation + EPSILON)
        unit = centered / (deviation + EPSILON)
        of_deviation = jnp.sum(g * (_looked_up(codes, bits) - share * unit), axes, keepdims=True)
        numbers = math.prod(w.shape[stack:])
        slope = centered / ((numbers - 1) * jnp.maximum(deviation, float(jnp.finfo(jnp.float32).tiny)))
        dw = share * g + (1 - share) * jnp.mean(g, axes, keepdims=True) + of_deviation * slope
        return (dw.astype(w.dtype),)

    return with_backward(value, lambda w: (value(w), w), backward)(w)


def _coded(w: Array, stack: int, bits: int) -> tuple[Array, Array, Array]:
    """The codes of an array, in its shape, and mean and deviation of each matrix, which broadcast to it."""
    w, axes = w.astype(jnp.float32), tuple(range(stack, w.ndim))
    mean = jnp.mean(w, axes, keepdims=True)
    deviation = jnp.std(w, axes, ddof=1, keepdims=True)
    unit = (w - mean) / (deviation + EPSILON)
    edges = [(low + high) / 2 for low, high in itertools.pairwise(median_table(bits))]
    # Comparisons, which fuse and lie where the array does; a search in a table would not.
    codes = sum((unit > edge).astype(jnp.uint8) for edge in edges)
    assert not isinstance(codes, int)
    return codes, mean, deviation


def _looked_up(codes: Array, bits: int) -> Array:
    """The number of each code, in units of the deviation."""
    first, *others = median_table(bits)
    values = jnp.zeros_like(codes, jnp.float32) + first
    for code, value in enumerate(others, 1):
        values = jnp.where(codes >= code, value, values)
    return values


def _values(codes: Array, mean: Array, deviation: Array, bits: int) -> Array:
    return _looked_up(codes, bits) * deviation + mean


def _pack_low_first(codes: Array, bits: int) -> Array:
    """As `pack`, with the first code in a byte's low bits."""
    short = -codes.shape[-1] % (8 // bits)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    return pack(_turned(codes, bits), bits)


def _unpack_low_first(packed: Array, bits: int, width: int) -> Array:
    codes = _turned(unpack(packed, bits, packed.shape[-1] * 8 // bits), bits)
    return codes[..., :width]


def _turned(codes: Array, bits: int) -> Array:
    """The codes of each byte in the other order."""
    lead: Sequence[int] = codes.shape[:-1]
    return codes.reshape(*lead, -1, 8 // bits)[..., ::-1].reshape(codes.shape)
