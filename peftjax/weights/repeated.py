"""Weights of which a stack has some several times, each of them held once."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_logical
from peftjax.weights.fields import Slots, shared, stacked, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.views import WholeMatrices


@structured
class Repeated(WholeMatrices, Weight):
    """`w[n, ...] = matrices[numbers[n, ...]]`: a layer reads its matrix where it is, and none is copied.

    Attributes:
        matrices: `{"matrices": [*held stack, in, out]}`, each once.
        numbers: of each matrix of the stack, its number along every axis of the held stack, by axis.
        layout: of the logical axes.
        of_dtype: of the array that this weight stands for.
    """

    matrices: Slots = shared()
    numbers: Slots = stacked()
    layout: Layout = static()
    of_dtype: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """That of the matrices, or what they were cast to."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """The matrices in their places."""
        places = tuple(self.numbers[axis] for axis in sorted(self.numbers))
        taken = self.matrices["matrices"].at[places].get(mode="promise_in_bounds")
        return to_logical(taken, self.layout).astype(self.dtype)

    def cast(self, dtype: Any) -> "Repeated":
        """The weight in another dtype, to which each layer casts its own matrix."""
        return replace(self, of_dtype=jnp.dtype(dtype))
