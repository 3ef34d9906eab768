"""A weight that is formed in its layer from numbers of its own, and has no base."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_logical
from peftjax.weights.fields import Slots, stacked, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices

Form = Callable[[Slots], Array]
"""`slots of one matrix -> [in, out]`; static, so hashable."""


@structured
class Formed(WholeMatrices, Weight):
    """`w = form(slots)`, merged inside each layer; backward keeps the slots and forms it again.

    Attributes:
        slots: arrays `[*stack, ...]`.
        layout: of the logical axes.
        form: of one matrix.
        of_dtype: of the array that this weight stands for, whatever that of the slots.
    """

    slots: Slots = stacked()
    layout: Layout = static()
    form: Form = static()
    of_dtype: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """The array, formed in the slots' dtype."""
        w = over_stack(self.form, len(self.layout.stack))(self.slots)
        return to_logical(w, self.layout).astype(self.dtype)

    def cast(self, dtype: Any) -> "Formed":
        """The same numbers, whose array has another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))
