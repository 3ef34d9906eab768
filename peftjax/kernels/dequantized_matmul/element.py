"""What a code stands for, as arithmetic and selects on vectors: what every body computes, with no gather.

W[o, i] = element(code[o, i]) · scale[o, i // group] (+ shift[o, i // group])        in float32
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

Table = tuple[float, ...]


def weight(codes: Array, scales: Array, shifts: Array | None, table: Table | None) -> Array:
    """Float32 weights of int32 codes; scales and shifts broadcast to them."""
    elements = codes.astype(jnp.float32) if table is None else element(codes, table)
    return shifted(elements, scales, shifts)


def shifted(elements: Array, scales: Array, shifts: Array | None) -> Array:
    """`element · scale (+ shift)` in float32."""
    value = elements * scales.astype(jnp.float32)
    return value if shifts is None else value + shifts.astype(jnp.float32)


def element(codes: Array, table: Table) -> Array:
    """`table[codes]` in float32; codes int32, the table's length a power of two.

    An arithmetic progression, as int4 is, is arithmetic. A table whose second half is its first negated, as
    FP4 is, is a sign and half a table. Any other table is a binary tree of selects, a level per bit.
    """
    if len(table) == 1:
        return jnp.full(codes.shape, table[0], jnp.float32)
    if len(table) > 2 and (progression := _progression(table)) is not None:
        start, step = progression
        return codes.astype(jnp.float32) * step + start
    half = len(table) // 2
    lower, upper = table[:half], table[half:]
    rest = codes & (half - 1) if half > 1 else codes
    low = element(rest, lower)
    high = -low if upper == tuple(-number for number in lower) else element(rest, upper)
    return jnp.where((codes & half) != 0, high, low)


def _progression(table: Table) -> tuple[float, float] | None:
    """Start and step where `start + step · code` is the table with no rounding in float32."""
    start, step = table[0], table[1] - table[0]
    numbers = [start + step * code for code in range(len(table))]
    exact = all(
        number == want == np.float32(want) and step * code == np.float32(step * code)
        for code, (number, want) in enumerate(zip(numbers, table))
    )
    return (start, step) if exact else None
