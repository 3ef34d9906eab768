"""A penalty on factors whose rows are not orthonormal, by its gradient."""

import math

import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.transform.around import Own, require_together

FACTORS = ("a", "b")


def penalize(caller: str, weight: float) -> optax.GradientTransformationExtraArgs:
    """Add to the gradients that of `weight · mean(‖a aᵀ - I‖, ‖b bᵀ - I‖)`, over all factors it is given.

    The penalty depends on what is trained alone, so that this is what adding it to the loss would give.

    Raises:
        PeftError: in `update`, without the parameters or with a part of a weight's factors.
    """

    def init(params: Own) -> optax.EmptyState:
        require_together(caller, params)
        return optax.EmptyState()

    def update(
        updates: Own, state: optax.EmptyState, params: Own | None = None, **extra: object
    ) -> tuple[Own, optax.EmptyState]:
        if params is None:
            raise PeftError(
                f"{caller}: the update needs the parameters; call tx.update(grads, state, params)"
            )
        matrices = sum(math.prod(own[name].shape[:-2]) for own in params.values() for name in FACTORS)
        new = {}
        for path, slots in updates.items():
            added = {name: weight / matrices * slope_of_excess(params[path][name]) for name in FACTORS}
            new[path] = {
                name: grad + added[name].astype(grad.dtype) if name in added else grad
                for name, grad in slots.items()
            }
        return new, state

    return optax.GradientTransformationExtraArgs(init, update)


def slope_of_excess(factor: Array) -> Array:
    """The gradient of `‖f fᵀ - I‖` for matrices f `[*stack, r, n]`; zero where their rows are orthonormal."""
    f = factor.astype(jnp.float32)
    excess = jnp.einsum("...rn,...sn->...rs", f, f) - jnp.eye(f.shape[-2])
    norm = jnp.linalg.norm(excess, axis=(-2, -1), keepdims=True)
    return 2.0 * jnp.where(norm > 0.0, excess / jnp.where(norm > 0.0, norm, 1.0), 0.0) @ f
