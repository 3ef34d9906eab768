"""Squared lengths of a weight's columns or rows, without the dense weight where its parts tell them.

‖(W + s aᵀb)_j‖² = ‖W_j‖² + 2s b_j·(aW)_j + s² b_jᵀ(aaᵀ)b_j        the same for rows, a and b exchanged
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.weights.base import Weight, contract
from peftjax.weights.contraction import Dot
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.layout import Layout, Side
from peftjax.weights.low_rank import LowRank
from peftjax.weights.scaled import Scaled


def squared_norms(w: Any, layout: Layout, side: Side) -> Array:
    """The sums of squares over all members of a side, float32 `[*stack, members of the other side]`.

    Differentiable by every part of the weight; a weight whose parts do not tell them is merged, which
    the backward pass recomputes.
    """
    if isinstance(w, LowRank):
        first, second = (w.a, w.b) if side == "i" else (w.b, w.a)
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        cross = jnp.sum(second * rows_through(first, w.base, w.layout, side), axis=-2)
        gram = jnp.einsum("...ri,...qi->...rq", first, first)
        own = jnp.sum(second * jnp.einsum("...rq,...qo->...ro", gram, second), axis=-2)
        squares = squared_norms(w.base, w.layout, side) + 2.0 * w.scale * cross + w.scale**2 * own
        return jnp.maximum(squares, 0.0)  # rounding may go below
    if isinstance(w, Scaled):
        return w.factor[..., None] ** 2 * squared_norms(w.base, w.layout, side)
    numbers = w.factor("o" if side == "i" else "i") if isinstance(w, Diagonal) else None
    if isinstance(w, Diagonal) and w.factor(side) is None and numbers is not None:
        return numbers**2 * squared_norms(w.base, w.layout, side)
    if isinstance(w, Weight):
        return jax.checkpoint(lambda w: squared_norms_of_array(w.dense(), w.layout, side))(w)
    return squared_norms_of_array(w, layout, side)


def squared_norms_of_array(w: Array, layout: Layout, side: Side) -> Array:
    """The sums of squares over a side of an array, float32 `[*stack, members of the other side]`."""
    other: Side = "o" if side == "i" else "i"
    squares = jnp.square(w.astype(jnp.float32))
    order = sum((layout.positions(kind) for kind in ("1", "s", side, other)), ())
    first = len(layout.positions("1")) + len(layout.stack)
    summed = lax.transpose(squares, order).sum(axis=range(first, first + len(layout.positions(side))))
    return summed.reshape(*layout.stack, -1)


def rows_through(rows: Array, base: Any, layout: Layout, side: Side = "i") -> Array:
    """`rows W` for rows `[*stack, r, members of a side]`: float32 `[*stack, r, members of the other]`.

    By the base's own rule; for outputs it is `rows Wᵀ`.
    """
    n_stack, met = len(layout.stack), layout.positions(side)
    x = rows.reshape(*rows.shape[:-1], *(layout.shape[p] for p in met)).astype(base.dtype)
    rule = Dot(
        x_contract=tuple(n_stack + 1 + n for n in range(len(met))),
        w_contract=met,
        x_batch=tuple(range(n_stack)),
        w_batch=layout.positions("s"),
        preferred=jnp.float32,
    )
    y = contract(x, base, rule)  # [*stack, r, unit axes and those of the other side in logical order]
    outputs = layout.positions("o" if side == "i" else "i")
    left = sorted((*outputs, *layout.positions("1")))
    at = [n_stack + 1 + left.index(p) for p in (*layout.positions("1"), *outputs)]
    return lax.transpose(y, (*range(n_stack + 1), *at)).reshape(*rows.shape[:-1], -1)
