"""The dynamic map: 256 numbers of [-1, 1] whose spacing follows their size, and the way there and back.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv 2110.02861. The decade
(10^(e-E-1), 10^(e-E)] holds the middles of 2^e equal bins:

    v(j) = 10^(e-E) (0.1 + 0.9 (k + 0.5) / 2^e),   j = 2^e + k,   0 <= k < 2^e

    signed     E = 6, e = 0..6: -v(127) .. -v(1), 0, v(1) .. v(127), 1    code = j + 127, j = -127..128
    unsigned   E = 7, e = 1..7: 0, v(2) .. v(255), 1                      code = j - 1,   j = 1..256

A code is the place of its number among the 256 in ascending order, as in the released `create_dynamic_map`.
-1 is not in the signed map. Both directions are arithmetic on j, with no table: elementwise, so that a
compiler fuses them with what makes and takes the numbers.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

_SHIFT = {True: 127, False: -1}
_DECADES = {True: range(0, 7), False: range(1, 8)}


def dynamic_map(signed: bool) -> Float[np.ndarray, "256"]:
    """The numbers of the codes 0..255, ascending, float64."""
    sizes = [
        10.0 ** (e - _DECADES[signed][-1]) * (0.1 + 0.9 * (k + 0.5) / 2**e)
        for e in _DECADES[signed]
        for k in range(2**e)
    ]
    return np.array([*[-size for size in reversed(sizes) if signed], 0.0, *sizes, 1.0])


def decode_unit(codes: UInt8[Array, "..."], signed: bool) -> Float[Array, "..."]:
    """The numbers of codes, float32 in [-1, 1]."""
    place = codes.astype(jnp.int32) - _SHIFT[signed]
    value = _value(jnp.abs(place), signed)
    return jnp.where(place < 0, -value, value) if signed else value


def encode_unit(
    x: Float[Array, "..."], signed: bool, noise: Float[Array, "..."] | None = None
) -> UInt8[Array, "..."]:
    """The codes of numbers in [-1, 1] (what lies outside counts as the nearest of the two ends).

    Without noise the nearest number of the map (of a middle, either). With noise uniform in [0, 1), one of
    the two numbers around x, the upper with probability (x - lower) / (upper - lower), so that the mean is x;
    only below -v(127) of the signed map is there nothing to choose.

    The unsigned map is of what an optimizer divides by: only zero becomes zero, also with noise, and whatever
    is between zero and v(2) becomes v(2). A second moment rounded to zero beside a first moment that is not
    would make a step of size mu / eps.
    """
    size = jnp.abs(x) if signed else jnp.maximum(x, 0.0)
    place = _nearest(size, signed)
    if noise is not None:
        place = _randomly(size, place, signed, noise)
    if signed:
        place = jnp.where(x < 0, -jnp.minimum(place, 127), place)
    else:
        place = jnp.where(size > 0, jnp.maximum(place, 2), 1)
    return (place + _SHIFT[signed]).astype(jnp.uint8)


def _value(j: Int[Array, "..."], signed: bool) -> Float[Array, "..."]:
    """v(j), for j of a map's nonnegative half."""
    slope, offset = jnp.float32(0.0), jnp.float32(0.0)
    for e in _DECADES[signed]:
        unit = 10.0 ** (e - _DECADES[signed][-1])
        slope = jnp.where(j >= 2**e, np.float32(unit * 0.9 / 2**e), slope)
        offset = jnp.where(j >= 2**e, np.float32(unit * (0.45 / 2**e - 0.8)), offset)
    value = slope * j.astype(jnp.float32) + offset
    return jnp.where(j == 2 ** (e + 1), 1.0, value)


def _nearest(size: Float[Array, "..."], signed: bool) -> Int[Array, "..."]:
    """The j whose v(j) is nearest to a number that is not negative."""
    slope, first = jnp.float32(0.0), jnp.int32(0)
    least = 0 if signed else 1
    for e, edge in zip(_DECADES[signed], _edges(signed)):
        unit = 10.0 ** (e - _DECADES[signed][-1])
        slope = jnp.where(size >= edge, np.float32(2**e / (0.9 * unit)), slope)
        first = jnp.where(size >= edge, 2**e, first)
    # The bins of a decade begin at 0.1 of its end: v(j) lies in the middle of [j, j + 1) of this scale.
    place = jnp.floor(slope * size + first.astype(jnp.float32) * np.float32(8 / 9)).astype(jnp.int32)
    place = jnp.where(first == 0, least, jnp.clip(place, first, 2 * first - 1))
    return jnp.where(size >= _edges(signed)[-1], 2 ** (e + 1), place)


def _randomly(
    size: Float[Array, "..."], place: Int[Array, "..."], signed: bool, noise: Float[Array, "..."]
) -> Int[Array, "..."]:
    """The nearest j or its neighbor on the other side of `size`."""
    least, greatest = (0, 128) if signed else (1, 256)
    value = _value(place, signed)
    other = jnp.clip(jnp.where(size < value, place - 1, place + 1), least, greatest)
    gap = jnp.abs(_value(other, signed) - value)
    return jnp.where(noise * gap < jnp.abs(size - value), other, place)


def _edges(signed: bool) -> list[np.float32]:
    """From where on the nearest number is of the decade e, for every e, and from where on it is 1."""
    half = dynamic_map(signed)[127 if signed else 0 :]
    middles = (half[1:] + half[:-1]) / 2
    starts = [2**e - (1 if signed else 2) for e in (*_DECADES[signed], _DECADES[signed][-1] + 1)]
    return [np.float32(middles[start]) for start in starts]
