"""A weight times one number for each input or each output: a norm's gain, a normalized weight, a scale."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.weights.base import Weight, cast, contract, dense, lazily_merged
from peftjax.weights.canonical import along, along_result, side_of, side_to_logical
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout, Side


@structured
class Diagonal(Weight):
    """`w = base`, its inputs times `by_input [*stack, in]` and its outputs times `by_output [*stack, out]`.

    A product scales x, or the result. What no scaling of these equals is merged in the layer.
    """

    base: Any = logical()
    layout: Layout = static()
    by_input: Array | None = canonical("i", default=None)
    by_output: Array | None = canonical("o", default=None)

    def dense(self) -> Array:
        """The product, in the base's dtype."""
        w = dense(self.base)
        for side in ("i", "o"):
            if (factor := self.factor(side)) is not None:
                w = w * side_to_logical(factor, self.layout, side)
        return w.astype(self.dtype)

    def factor(self, side: Side) -> Array | None:
        """The numbers of one side."""
        return self.by_input if side == "i" else self.by_output

    def supports(self, rule: Contraction) -> bool:
        """What the base supports, but for sums over a stack, whose matrices have numbers of their own."""
        if isinstance(rule, RaggedDot) and not rule.of_rows:
            return False
        if isinstance(rule, Dot) and side_of(self.layout, rule.w_contract) is None:
            return False
        return not isinstance(self.base, Weight) or self.base.supports(rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product with x scaled, the result scaled."""
        side = side_of(self.layout, rule.w_contract)
        every_matrix = set(self.layout.positions("s")) <= set(rule.w_batch)
        if side is None or (self.factor(side) is not None and not every_matrix):
            return lazily_merged(rule, x, self)
        if (entering := self.factor(side)) is not None:
            x = _scaled_input(x, entering, rule, self.layout, side)
        y = contract(x, self.base, rule)
        other: Side = "o" if side == "i" else "i"
        leaving = self.factor(other)
        return y if leaving is None else _scaled_result(y, leaving, rule, self.layout, other)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows, scaled."""
        if self.layout.stack:
            return lazily_merged(rule, indices, self)
        rows = contract(indices, self.base, rule)
        for side in ("i", "o"):
            if (factor := self.factor(side)) is None:
                continue
            factor = side_to_logical(factor, self.layout, side)
            looked_up = rule.axis in self.layout.positions(side)
            rows = rescaled(
                rows, contract(indices, factor, rule) if looked_up else lax.squeeze(factor, (rule.axis,))
            )
        return rows

    def conv(self, x: Array, rule: Conv) -> Array:
        """The base's convolution, its channels scaled, or those of x where it meets the outputs."""
        numbers, outputs = rule.dimension_numbers, self.layout.positions("o")
        gains = self.by_output
        if self.by_input is not None or gains is None or self.layout.stack:
            return lazily_merged(rule, x, self)
        if outputs == (numbers.rhs_spec[1],):
            gains = jnp.tile(gains, rule.feature_group_count)
            return contract(rescaled(x, along(gains, (numbers.lhs_spec[1],), x.ndim)), self.base, rule)
        if outputs != (numbers.rhs_spec[0],):
            return lazily_merged(rule, x, self)
        return rescaled(contract(x, self.base, rule), along(gains, (numbers.out_spec[1],), x.ndim))

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The base's ragged product, each row of x and of the result scaled by its expert's numbers."""
        side = side_of(self.layout, rule.w_contract)
        if side is None or not rule.of_rows or len(self.layout.axes) != 3:
            return lazily_merged(rule, x, self)
        entering, leaving = self.factor(side), self.factor("o" if side == "i" else "i")
        if entering is not None:
            axes = (*rule.numbers.lhs_ragged_dimensions, *rule.x_contract)
            x = rescaled(x, along(rule.by_row(entering, x), axes, x.ndim))
        y = contract(x, self.base, rule)
        if leaving is None:
            return y
        return rescaled(y, along(rule.by_row(leaving, x), (rule.row_axis, y.ndim - 1), y.ndim))

    def cast(self, dtype: Any) -> "Diagonal":
        """The base in another dtype; the numbers stay as exact as they are."""
        return replace(self, base=cast(self.base, dtype))


def _scaled_input(x: Array, numbers: Array, rule: Dot, layout: Layout, side: Side) -> Array:
    """X times one number `[*stack, n]` for each member of the side that it meets; its matrices lie in x."""
    numbers = side_to_logical(numbers, layout, side)
    met, axes = (*rule.w_batch, *rule.w_contract), (*rule.x_batch, *rule.x_contract)
    rest = [p for p in range(numbers.ndim) if p not in met]
    numbers = lax.transpose(lax.squeeze(numbers, rest), [sorted(met).index(p) for p in met])
    numbers = lax.transpose(numbers, sorted(range(len(axes)), key=lambda n: axes[n]))
    shape = [1] * x.ndim
    for axis, size in zip(sorted(axes), numbers.shape):
        shape[axis] = size
    return rescaled(x, numbers.reshape(shape))


def _scaled_result(y: Array, numbers: Array, rule: Dot, layout: Layout, side: Side) -> Array:
    """A product's result times one number `[*stack, n]` for each member of the side that x did not meet."""
    numbers = side_to_logical(numbers, layout, side)
    return rescaled(y, along_result(numbers, rule, layout, y.ndim))


@jax.checkpoint
def rescaled(y: Array, gain: Array) -> Array:
    """`y · gain` in the dtype of y."""
    # Rematerialized, so that backward keeps y in its own dtype and not the float32 of the product.
    return (y * gain).astype(y.dtype)
