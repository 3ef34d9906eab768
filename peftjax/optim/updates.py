"""What every transformation here does with the gradients and parameters it is given."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.errors import PeftError


def widened(x: Array) -> Array:
    """The array in float32, or in its own dtype where that is wider: what updates are computed in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def require_params(params: Any, who: str) -> None:
    """Raise a PeftError where an update was asked for without the parameters."""
    if params is None:
        raise PeftError(f"{who}: give the parameters too, update(gradients, state, params)")
