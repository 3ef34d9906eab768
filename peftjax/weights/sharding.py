"""Shardings that are part of an array's type: meshes with Explicit axes, JAX's default."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core.sharding import explicit_sharding


def type_of(w: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, with the sharding of `w`, if any, where that is part of its type."""
    sharding = None if w is None else explicit_sharding(w)
    if sharding is None or len(sharding.spec) > len(shape):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def keeping(x: Array, axes: Sequence[int | None], more: int = 0) -> NamedSharding | None:
    """The sharding of a result with the given axes of x (None: a new one), and `more` new ones behind.

    None where shardings are the compiler's to find.
    """
    sharding = explicit_sharding(x)
    if sharding is None:
        return None
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    own = (None if axis is None else spec[axis] for axis in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*own, *(None,) * more))


def like(x: Array, y: Array) -> Array:
    """`x` sharded as `y`, where shardings are part of the type."""
    sharding = explicit_sharding(y)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def whole(x: Array) -> Array:
    """`x` on every device, for what has no rule for a divided axis: decompositions, sorts, flat reshapes."""
    sharding = explicit_sharding(x)
    return x if sharding is None else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def undivided(x: Array, axes: Sequence[int]) -> Array:
    """`x` with these axes whole on every device and the others as they are divided."""
    sharding = keeping(x, [None if n in axes else n for n in range(x.ndim)])
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def is_explicit(x: Array) -> bool:
    """Whether the sharding of x is part of its type."""
    return explicit_sharding(x) is not None
