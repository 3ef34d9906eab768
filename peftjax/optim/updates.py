"""What the transformations here share: dtypes, and errors for options and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.errors import PeftError


def widened(x: Array) -> Array:
    """The array in float32, or in its own dtype where that is wider: what updates are computed in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def is_placeholder(params: Any) -> bool:
    """Whether `init` was called by `optax.tree.map_params`, with a node of its own that has no leaves.

    Such a state has one leaf where it would have one for each parameter by its name.
    """
    plain = params is None or isinstance(params, (dict, list, tuple))
    return not plain and jax.tree.structure(params).num_leaves == 0


def require_known(caller: str, **values: Any) -> None:
    """Raise a PeftError that names an option which shapes depend on, where it is an array or traced."""
    for name, value in values.items():
        if isinstance(value, jax.Array):
            raise PeftError(
                f"{caller}: {name} decides shapes and must be a Python number; under "
                f"optax.inject_hyperparams name it in static_args"
            )


def require_params(params: Any, caller: str) -> None:
    """Raise a PeftError where an update was asked for without the parameters."""
    if params is None:
        raise PeftError(f"{caller}: give the parameters too, update(gradients, state, params)")
