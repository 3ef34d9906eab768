"""The affine code of a group, on arrays in which one axis runs over the group: what every body computes.

    low = min(a) rounded down,  step = (max(a) - low) / 15,  c = round((a - low) / step),  â = low + step c
    f = round(15 ((a - low) / step - c)) + 7,                              â = low + step (c + (f - 7) / 15)

`low` and `step` are bfloat16. The first line errs by at most step / 2, with the second by step / 30.
"""

import jax.numpy as jnp
from jax import Array

LEVELS = 15
MIDDLE = 7


def limits(smallest: Array, largest: Array) -> tuple[Array, Array]:
    """`low` and `step` as float32 numbers that bfloat16 holds exactly."""
    low = as_bfloat16(smallest)
    # Nothing may lie below low. A bfloat16's neighbors are at most 1/128 of it apart.
    low = jnp.where(low > smallest, as_bfloat16(smallest - jnp.abs(smallest) / 128), low)
    return low, as_bfloat16((largest - low) / LEVELS)


def as_bfloat16(x: Array) -> Array:
    """Float32 numbers rounded to those of bfloat16."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def coarse(a: Array, low: Array, step: Array, noise: Array | float | None = None) -> tuple[Array, Array]:
    """The int32 codes c, and what they leave of `a`, in steps; `noise` in [0, 1) rounds at random."""
    place = (a - low) * jnp.where(step > 0, 1 / step, 0)
    c = jnp.clip(_rounded(place, noise), 0, LEVELS)
    return c.astype(jnp.int32), place - c


def fine(rest: Array, noise: Array | float | None = None) -> Array:
    """The int32 codes f of what the coarse codes left."""
    return jnp.clip(_rounded(LEVELS * rest, noise) + MIDDLE, 0, LEVELS).astype(jnp.int32)


def value(c: Array, f: Array | None, low: Array, step: Array) -> Array:
    """`â`, float32."""
    place = c.astype(jnp.float32)
    if f is not None:
        place += (f - MIDDLE).astype(jnp.float32) / LEVELS
    return low + step * place


def _rounded(x: Array, noise: Array | float | None) -> Array:
    return jnp.floor(x + (0.5 if noise is None else noise))
