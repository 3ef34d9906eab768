"""New directions for trained factors, which leave their product as it is and can learn.

    aᵀb  =  [a; a']ᵀ [b; 0]        a' as in a fresh LoRA (for a lookup table [a; 0]ᵀ [b; b'])

A direction whose factors are both zero has no gradient, and would stay zero.
"""

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.methods._targets import key_for
from peftjax.methods.lowrank._factors import ScaledTarget, start_uniform
from peftjax.weights.layout import Layout


def default_key() -> Array:
    """The key of new directions where none is given: always the same."""
    return jax.random.key(0)


def adapted(a: Array, b: Array) -> Array:
    """Which matrices of the stack have an adapter, `[*stack, 1, 1]`: the option `layers` leaves some out."""
    used = (a != 0).any((-2, -1), keepdims=True) | (b != 0).any((-2, -1), keepdims=True)
    return used | ~used.any()


def grown(a: Array, b: Array, rank: int, key: Array, layout: Layout) -> tuple[Array, Array]:
    """The factors with more rows, `rank` in all, the first of them as they are.

    Args:
        a: `[*stack, r, in]`.
        b: `[*stack, r, out]`.
        rank: at least r.
        key: of the new directions; the weight's name is folded in.
        layout: of the weight.
    """
    used = adapted(a, b)
    new_a, new_b = _fresh(rank - a.shape[-2], key, layout)
    a = jnp.concatenate([a, jnp.where(used, new_a, 0).astype(a.dtype)], axis=-2)
    return a, jnp.concatenate([b, jnp.where(used, new_b, 0).astype(b.dtype)], axis=-2)


def revived(
    factors: tuple[Array, Array], sizes: Array, used: Array, key: Array, layout: Layout
) -> tuple[Array, Array]:
    """The factors with those directions started afresh of which nothing but rounding is left.

    Args:
        factors: `a [*stack, r, in]` and `b [*stack, r, out]`.
        sizes: the singular values `[*stack, r]` of their product, one a direction, the largest first.
        used: as `adapted` gives it.
        key: of the new directions.
        layout: of the weight.
    """
    a, b = factors
    rounding = max(layout.matrix) * jnp.finfo(sizes.dtype).eps
    dead = (sizes <= rounding * sizes[..., :1])[..., None] & used
    fresh_a, fresh_b = _fresh(a.shape[-2], key, layout)
    return jnp.where(dead, fresh_a, a).astype(a.dtype), jnp.where(dead, fresh_b, b).astype(b.dtype)


def _fresh(rank: int, key: Array, layout: Layout) -> tuple[Array, Array]:
    target = ScaledTarget(path=layout.name, layout=layout, rank=rank, scale=1.0)
    a, b, _ = start_uniform(key_for(key, layout.name), target, None)
    return a, b
