"""Mesh axes of type Explicit, where a result's sharding is part of its type: what the products' results have.

Inside, the axes are Auto: the compiler finds how a tile of weights is sharded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core.sharding import explicit_sharding


def of_product(operands: Sequence[Array | None], transposed: bool) -> NamedSharding | None:
    """What y has of x's rows and of the weight's outputs, or inputs if transposed: each mesh axis once."""
    x, codes = operands[:2]
    of_x, of_codes = explicit_sharding(x), explicit_sharding(codes)
    if of_x is None and of_codes is None:
        return None
    rows = _axes(of_x, x.ndim)[:-1]
    used = {name for axis in rows for name in _names(axis)}
    columns = _axes(of_codes, codes.ndim)[-1 if transposed else -2]
    spec = PartitionSpec(*rows, None if used & set(_names(columns)) else columns)
    return NamedSharding((of_x or of_codes).mesh, spec)


def with_sharding(f: Callable[..., Array], sharding: NamedSharding | None) -> Callable[..., Array]:
    """`f`, whose result has this sharding; None where shardings are the compiler's to find."""
    return f if sharding is None else jax.sharding.auto_axes(f, out_sharding=sharding)


def _axes(sharding: NamedSharding | None, ndim: int) -> tuple[Any, ...]:
    spec = () if sharding is None else tuple(sharding.spec)
    return (*spec, *(None,) * (ndim - len(spec)))


def _names(axis: Any) -> tuple[Any, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)
