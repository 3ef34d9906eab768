"""A weight whose numbers are divided by trained factors, each by one of its own."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight, dense
from peftjax.weights.canonical import side_to_logical
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.rounded import bounded


@structured
class Divided(Weight):
    """`w = base · exp(-c(d) - c(e))`, d of each number, e of each output; c cuts to ±log 4.

        d = log + by_output + by_input

    The logarithms are float32, and so is the product until it is rounded to its dtype. Each layer merges it:
    backward keeps its input and the parts.

    Attributes:
        base: an array, or a weight with an adapter.
        log: an array or a weight of the logical shape.
        layout: of the logical axes.
        of_dtype: of the array that it stands for.
        log_output: e, `[*stack, out]`.
        by_output: `[*stack, out]`.
        by_input: `[*stack, in]`.
    """

    base: Any = logical()
    log: Any = logical()
    layout: Layout = static()
    of_dtype: Any = static()
    log_output: Array = canonical("o")
    by_output: Array | None = canonical("o", default=None)
    by_input: Array | None = canonical("i", default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """The divided array."""
        log = dense(self.log)
        if self.by_output is not None:
            log += side_to_logical(self.by_output, self.layout, "o")
        if self.by_input is not None:
            log += side_to_logical(self.by_input, self.layout, "i")
        log = bounded(log) + side_to_logical(bounded(self.log_output), self.layout, "o")
        return (dense(self.base).astype(jnp.float32) * jnp.exp(-log)).astype(self.dtype)

    def cast(self, dtype: Any) -> "Divided":
        """The same, in another dtype; base and logarithms stay as exact as they are."""
        return replace(self, of_dtype=jnp.dtype(dtype))
