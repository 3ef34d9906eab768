"""A threshold by selection: order statistics found from counts, without a sort and at any size.

The bits of non-negative floats are ordered as the floats are. The k-th smallest is built from its
highest bit down: a candidate is at most the k-th smallest exactly when at most k values lie below it.
Counts are sums, so that a partitioned matrix has the threshold of the whole one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction

LARGEST = 2**31 - 1


class Counted(NamedTuple):
    """What one pass over a matrix finds.

    below: int32 `[*stack, C]`, how many values lie below each candidate.
    least: int32 `[*stack]`, the bits of the smallest value that is not below the last candidate.
    """

    below: Array
    least: Array


Count = Callable[[Array], Counted]  # of candidates, int32 bits [*stack, C], ascending


def quantile(
    count: Count, level: Array, size: int, kernel_function: KernelFunction, bits_per_pass: int = 1
) -> Array:
    """The threshold t, float32 `[*stack]`, of matrices of `size` values seen only through `count`.

    `released` and `hard`: between the two values around position `level·(size - 1)`, linearly. `paper`:
    the ceil(level·size)-th smallest, at least the first. At level 0, t is the smallest value, so that
    the strict comparison prunes it and nothing else.

    Positions are float32, as in torch.quantile: of more than 2^24 values a position is a whole number,
    to within size/2^25 places of the exact one, and t is then a value of the matrix.
    """
    level = level.astype(jnp.float32)
    if kernel_function.mode == "paper":
        return _value(_select(count, _place(jnp.ceil(level * size) - 1.0, size), bits_per_pass))
    position = jnp.clip(level * (size - 1), 0.0, size - 1)
    place = _place(jnp.floor(position), size)
    lower = _select(count, place, bits_per_pass)
    counted = count(lower[..., None] + 1)
    upper = jnp.where(counted.below[..., 0] > place + 1, lower, counted.least)
    upper = jnp.where(place + 1 < size, upper, lower)
    return _between(_value(lower), _value(upper), position - jnp.floor(position))


def counter(magnitudes: Array) -> Count:
    """Counts over stored magnitudes `[*stack, n, m]`."""
    bits = lax.bitcast_convert_type(magnitudes, jnp.int32)

    def count(candidates: Array) -> Counted:
        spread = candidates[..., None, None]
        below = jnp.sum(bits[..., None, :, :] < spread, (-2, -1), dtype=jnp.int32)
        kept = jnp.where(bits < spread[..., -1, :, :], LARGEST, bits)
        return Counted(below, jnp.min(kept, (-2, -1)))

    return count


def _select(count: Count, place: Array, bits_per_pass: int) -> Array:
    """The bits, int32 `[*stack]`, of the value that `place` values precede in ascending order."""
    steps = jnp.arange(1, 2**bits_per_pass, dtype=jnp.int32)

    def narrow(i: Array, found: Array) -> Array:
        # The last pass may revisit bits that are decided: their candidates are all too large.
        shift = jnp.maximum(31 - bits_per_pass * (i + 1), 0)
        below = count(found[..., None] + (steps << shift)).below
        passed = jnp.sum(below <= place[..., None], -1, dtype=jnp.int32)
        return found + (passed << shift)

    return lax.fori_loop(0, -(-31 // bits_per_pass), narrow, jnp.zeros_like(place))


def _place(position: Array, size: int) -> Array:
    # A float32 size may be rounded up: first to what int32 holds, then, among integers, to the last place.
    return jnp.clip(jnp.minimum(position, 2.0**31 - 128).astype(jnp.int32), 0, size - 1)


def _value(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _between(lower: Array, upper: Array, share: Array) -> Array:
    """The point between, from the nearer end as torch.lerp takes it."""
    gap = upper - lower
    return jnp.where(share < 0.5, lower + share * gap, upper - gap * (1.0 - share))
