"""A weight plus, or times, an array or weight of its own shape, entry by entry."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight, contract, dense
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import logical, static, structured
from peftjax.weights.layout import Layout


@structured
class Sum(Weight):
    """`w = base + other`, in two products: exact, and no sum is formed."""

    base: Any = logical()
    other: Any = logical()
    layout: Layout = static()

    def dense(self) -> Array:
        """The sum, in the base's dtype."""
        return (dense(self.base) + dense(self.other)).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Whatever both support."""
        return all(not isinstance(w, Weight) or w.supports(rule) for w in (self.base, self.other))

    def dot(self, x: Array, rule: Dot) -> Array:
        """Both products."""
        return self._both(x, rule)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The rows of both."""
        return self._both(indices, rule)

    def conv(self, x: Array, rule: Conv) -> Array:
        """Both convolutions."""
        return self._both(x, rule)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """Both products."""
        return self._both(x, rule)

    def _both(self, x: Array, rule: Contraction) -> Array:
        y = contract(x, self.base, rule)
        return y + contract(x, self.other, rule).astype(y.dtype)


@structured
class Masked(Weight):
    """`w = base ∘ factor`, such as a mask of pruned entries.

    It has no thin form: each layer merges it. The backward pass recomputes the merge and keeps the layer's
    input and the parts; their gradient is taken from the dense one, which lives for one layer only.
    """

    base: Any = logical()
    factor: Array = logical()
    layout: Layout = static()

    def dense(self) -> Array:
        """The product, in the base's dtype."""
        return (dense(self.base) * jnp.asarray(self.factor)).astype(self.dtype)
