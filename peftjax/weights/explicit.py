"""Shardings that are part of an array's type: meshes with Explicit axes, JAX's default."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def type_of(w: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, with the sharding of `w` where that is part of its type."""
    sharding = _explicit(w)
    if sharding is None or len(sharding.spec) > len(shape):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def keeping(x: Array, axes: Sequence[int], more: int) -> NamedSharding | None:
    """The sharding of a product with the given axes of x and `more` unsharded axes behind them.

    None where shardings are the compiler's to find.
    """
    sharding = _explicit(x)
    if sharding is None:
        return None
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in axes), *(None,) * more))


def like(x: Array, y: Array) -> Array:
    """`x` sharded as `y`, where shardings are part of the type."""
    sharding = _explicit(y)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def is_explicit(x: Array) -> bool:
    """Whether the sharding of x is part of its type."""
    return _explicit(x) is not None


def _explicit(x: Any) -> NamedSharding | None:
    sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding
