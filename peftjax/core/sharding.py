"""Shardings that are part of an array's type: on meshes with Explicit axes, JAX's default."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding of x where it is part of its type; None where shardings are the compiler's to find."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding
