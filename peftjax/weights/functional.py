"""A weight that is a linear map of activations and nothing else: structured layers without a base."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight, lazily_merged
from peftjax.weights.canonical import side_of, to_logical
from peftjax.weights.contraction import Contraction, Dot, RaggedDot
from peftjax.weights.fields import stacked, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.mapped import Map, Mapped
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices


@structured
class Functional(WholeMatrices, Weight):
    """`w = M`: `x·w = map(slots, x)`; where x meets the outputs, the map's transpose.

    Backward keeps x and the slots, and recomputes what is in the map. What is no such product merges the
    weight in its layer.

    Attributes:
        slots: the map's numbers, arrays `[*stack, ...]`.
        layout: of the logical axes.
        map: the map of one matrix.
        of_dtype: of the array that this weight stands for, whatever that of the slots.
    """

    slots: Mapping[str, Array] = stacked()
    layout: Layout = static()
    map: Map = static()
    of_dtype: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """The map of the unit matrix."""
        n, stack = self.layout.matrix[0], self.layout.stack
        unit = jnp.broadcast_to(jnp.eye(n), (*stack, n, n))
        w = over_stack(self.map, len(stack))(self.slots, unit)
        return to_logical(w, self.layout).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """But for sums over a stack, whose matrices have maps of their own."""
        if isinstance(rule, RaggedDot) and not rule.of_rows:
            return False
        return not isinstance(rule, Dot) or side_of(self.layout, rule.w_contract) is not None

    def dot(self, x: Array, rule: Dot) -> Array:
        """The map, or its transpose."""
        side = side_of(self.layout, rule.w_contract)
        if side is None or set(self.layout.positions("s")) != set(rule.w_batch) or self.layout.positions("1"):
            return lazily_merged(rule, x, self)
        y = Mapped(None, self.slots, self.layout, self.map, "beside").beside(x, rule, side, None)
        return y if rule.preferred is None else y.astype(rule.preferred)

    def cast(self, dtype: Any) -> "Functional":
        """The same numbers, whose array has another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))
