"""Codes of fewer than 8 bits in bytes, along the last axis, the first one in a byte's high bits.

    4 bits   two to a byte            2 bits   four to a byte           1 bit   eight to a byte
    3 bits   2 bits, then 1 bit       5 bits   4 bits, then 1 bit       6 bits  4 bits, then 2 bits

The parts of 3, 5 and 6 bits are packed apart, the lower bits of all codes after the upper ones. A last axis
that fills no whole byte is filled up with zeros.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, UInt8

_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def packed_bytes(width: int, bits: int) -> int:
    """How many bytes `width` codes of so many bits take."""
    return sum(-(-width * part // 8) for part in _PARTS[bits])


def pack(codes: Integer[Array, "*lead width"], bits: int) -> UInt8[Array, "*lead bytes"]:
    """Codes 0 ... 2^bits - 1, of any integer type, as bytes."""
    parts, above = [], bits
    for part in _PARTS[bits]:
        above -= part
        parts.append(_joined((codes >> above) & (2**part - 1), part))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def unpack(packed: UInt8[Array, "*lead bytes"], bits: int, width: int) -> UInt8[Array, "*lead width"]:
    """The codes that `pack` was given."""
    codes, start = jnp.zeros((), jnp.uint8), 0
    for part in _PARTS[bits]:
        stop = start + -(-width * part // 8)
        codes = (codes << part) | _apart(packed[..., start:stop], part)[..., :width]
        start = stop
    return codes


def unpack_at(
    packed: UInt8[Array, "rows bytes"],
    bits: int,
    rows: Int[Array, "..."],
    places: Int[Array, "..."],
    width: int,
) -> UInt8[Array, "..."]:
    """The codes at these rows and places of what `pack` gave, read from their own bytes alone."""
    codes, start = jnp.zeros((), jnp.uint8), 0
    for part in _PARTS[bits]:
        each = 8 // part
        byte = packed[rows, start + places // each]
        shift = (8 - part * (1 + places % each)).astype(jnp.uint8)
        codes = (codes << part) | ((byte >> shift) & jnp.uint8(2**part - 1))
        start += -(-width * part // 8)
    return codes


def _joined(codes: Array, bits: int) -> Array:
    """Codes of 1, 2, 4 or 8 bits in bytes."""
    each = 8 // bits
    short = -codes.shape[-1] % each
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)]).astype(jnp.uint8)
    codes = codes.reshape(*codes.shape[:-1], -1, each)
    byte = codes[..., 0]
    for n in range(1, each):
        byte = (byte << bits) | codes[..., n]
    return byte


def _apart(packed: Array, bits: int) -> Array:
    """The codes of 1, 2, 4 or 8 bits in bytes."""
    shifts = jnp.arange(8 - bits, -1, -bits, dtype=jnp.uint8)
    codes = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)
