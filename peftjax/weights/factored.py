"""`scale · aᵀb` and nothing beside it: a weight that has no dense base at all."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight
from peftjax.weights.canonical import side_of, to_logical
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import canonical, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.low_rank import (
    low_rank_conv,
    low_rank_dot,
    low_rank_gather,
    low_rank_ragged_dot,
    low_rank_supports,
    met_side,
)


@structured
class Factored(Weight):
    """`w = scale · aᵀb` with `a [*stack, r, in]` and `b [*stack, r, out]`, contracted as `(x·aᵀ)·b`.

    The backward pass keeps x, where an input of a layer is kept anyway, and the thin `x·aᵀ`.
    """

    a: Array = canonical("i")
    b: Array = canonical("o")
    layout: Layout = static()
    of_dtype: Any = static()
    scale: float = static(default=1.0)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for, whatever that of the factors."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """`scale · aᵀb`, formed in the factors' dtype."""
        product = self.scale * jnp.einsum("...ri,...ro->...io", self.a, self.b)
        return to_logical(product, self.layout).astype(self.dtype)

    def cast(self, dtype: Any) -> "Factored":
        """The same factors, which take the dtype of the activation they meet."""
        return replace(self, of_dtype=jnp.dtype(dtype))

    def supports(self, rule: Contraction) -> bool:
        """Contractions over all inputs or all outputs."""
        return low_rank_supports(self.layout, rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """`scale · (x·first)·second`, first being the factor of the side that x meets."""
        side = met_side(self.layout, rule)
        return low_rank_dot(x, *self._sides(side), self.scale, rule, self.layout, side)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """`scale · aᵀ[rows]·b`."""
        side = side_of(self.layout, (rule.axis,))
        assert side is not None
        rows = low_rank_gather(indices, *self._sides(side), self.scale, rule, self.layout, side)
        return rows.astype(self.dtype)

    def conv(self, x: Array, rule: Conv) -> Array:
        """A convolution to r channels and a 1x1 one to all outputs."""
        return low_rank_conv(x, self.a, self.b, self.scale, rule, self.layout)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """Two ragged products with r numbers between them."""
        return low_rank_ragged_dot(x, self.a, self.b, self.scale, rule, self.layout)

    def _sides(self, side: Side) -> tuple[Array, Array]:
        return (self.a, self.b) if side == "i" else (self.b, self.a)
