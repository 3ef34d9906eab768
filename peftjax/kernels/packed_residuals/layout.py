"""How codes lie in bytes: in groups along the last axis, two to a byte, half a group apart.

    D values = G groups of g     G = ceil(D / group),  g = ceil(D / G), made even
    byte j of a group = code j  |  code (j + g/2) << 4

Both codes of a byte are of one group, so a shard of the last axis that holds whole groups holds whole bytes.
A last axis that is not G g long is padded with its last value, which changes no group's range.
"""

import jax.numpy as jnp
from jax import Array


def groups_of(width: int, group: int) -> tuple[int, int]:
    """`(G, g)`: how many groups a last axis of `width` has, and how many values each."""
    count = -(-width // group)
    size = -(-width // count)
    return count, size + size % 2


def grouped(x: Array, group: int) -> Array:
    """`[..., D]` as `[..., G, g]`."""
    count, size = groups_of(x.shape[-1], group)
    missing = count * size - x.shape[-1]
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge")
    return x.reshape(*x.shape[:-1], count, size)


def ungrouped(x: Array, width: int) -> Array:
    """`[..., G, g]` as `[..., D]`."""
    return x.reshape(*x.shape[:-2], -1)[..., :width]


def joined(codes: Array) -> Array:
    """Codes 0 ... 15, `[..., g]` of any integer type, as bytes `[..., g/2]`."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] | (codes[..., half:] << 4)).astype(jnp.uint8)


def split(packed: Array) -> Array:
    """The int32 codes `[..., g]` in bytes `[..., g/2]`."""
    packed = packed.astype(jnp.int32)
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)


def pack(codes: Array, group: int) -> Array:
    """Codes 0 ... 15 `[..., D]` as uint8 `[..., G g/2]`: D/2 bytes where D is a multiple of the group."""
    packed = joined(grouped(codes, group))
    return packed.reshape(*packed.shape[:-2], -1)


def unpack(packed: Array, width: int, group: int) -> Array:
    """The int32 codes `[..., width]` that `pack` was given."""
    count, _ = groups_of(width, group)
    return ungrouped(split(packed.reshape(*packed.shape[:-1], count, -1)), width)
