"""A weight times one number for each matrix of its stack."""

from typing import Any

import jax
from jax import Array, lax

from peftjax.weights.base import Weight, contract, dense, lazily_merged
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout


@structured
class Scaled(Weight):
    """`w = factor · base` with `factor [*stack]`, multiplied where the outputs are."""

    base: Any = logical()
    factor: Array = canonical()
    layout: Layout = static()

    def dense(self) -> Array:
        """`factor · base`, in the base's dtype."""
        sizes = [axis.size if axis.kind == "s" else 1 for axis in self.layout.axes]
        places = [self.layout.positions("s").index(p) for p in sorted(self.layout.positions("s"))]
        factor = lax.transpose(self.factor, places).reshape(sizes)
        return (dense(self.base) * factor).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Whatever the base supports."""
        if isinstance(rule, RaggedDot) and not rule.of_rows:
            return False
        if isinstance(rule, Dot) and any(self.layout.axes[p].kind == "s" for p in rule.w_contract):
            return False  # a sum over matrices that have numbers of their own
        return not isinstance(self.base, Weight) or self.base.supports(rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product, scaled."""
        stack = self.layout.positions("s")
        if not set(stack) <= set(rule.w_batch):
            return lazily_merged(rule, x, self)
        y = contract(x, self.base, rule)
        # Batch axes that are no stack have size 1 (units).
        order = [stack.index(p) for p in rule.w_batch if p in stack]
        sizes = [self.shape[p] for p in rule.w_batch]
        factor = lax.transpose(self.factor, order).reshape(*sizes, *(1,) * (y.ndim - len(sizes)))
        return _times(y, factor)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows, scaled."""
        if self.layout.stack:
            return lazily_merged(rule, indices, self)
        return _times(contract(indices, self.base, rule), self.factor)

    def conv(self, x: Array, rule: Conv) -> Array:
        """The base's convolution, scaled."""
        return _times(contract(x, self.base, rule), self.factor)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The base's ragged product, each row scaled by its expert's factor."""
        y = contract(x, self.base, rule)
        factors = rule.by_row(self.factor, x)
        return _times(y, lax.expand_dims(factors, [n for n in range(y.ndim) if n != rule.row_axis]))


@jax.checkpoint
def _times(y: Array, factor: Array) -> Array:
    return (y * factor).astype(y.dtype)
