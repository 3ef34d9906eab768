"""Adam's two running averages, in float32 or wider whatever the gradients are, stored in a chosen dtype.

m ← b1 m + (1 - b1) g     v ← b2 v + (1 - b2) g²     both start at 0, so E[m] = (1 - b1ᵗ) E[g]
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from peftjax.optim.updates import widened


def zero_moments(params: Any, dtype: DTypeLike | None) -> optax.ScaleByAdamState:
    """The state before the first step; without a dtype, the averages have that of their parameter."""
    mu, nu = (jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params) for _ in range(2))
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)


def next_moments(
    grads: Any, state: optax.ScaleByAdamState, b1: ArrayLike, b2: ArrayLike
) -> tuple[Any, Any, optax.ScaleByAdamState]:
    """`(m, v, state)` after a gradient; m and v as computed, not as stored."""

    def average(decay: ArrayLike, power: int, old: Any) -> Any:
        return jax.tree.map(lambda g, a: decay * widened(a) + (1 - decay) * widened(g) ** power, grads, old)

    def stored(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)

    mu, nu = average(b1, 1, state.mu), average(b2, 2, state.nu)
    count = optax.safe_increment(state.count)
    return mu, nu, optax.ScaleByAdamState(count, stored(mu, state.mu), stored(nu, state.nu))


def correction(decay: ArrayLike, count: Array) -> Array:
    """`1 - decayᵗ`; from the logarithm, as float32 rounds 1 - 0.999 by 1e-5 of it."""
    exact = isinstance(decay, float) and decay > 0
    return -jnp.expm1(count * (math.log(decay) if exact else jnp.log(decay)))
