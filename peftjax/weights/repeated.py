"""A stack whose matrices are a few distinct ones, each of them at several places."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_logical
from peftjax.weights.fields import canonical, shared, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices


@structured
class Repeated(WholeMatrices, Weight):
    """`w[i] = distinct[number[i]]`, taken inside each layer, so that no stack of them is formed.

    The gradient of `distinct` is the sum over all its places.

    Attributes:
        number: which matrix each of the stack is, `[*stack]`.
        distinct: the matrices `[k, in, out]`.
        layout: of the logical axes.
        of_dtype: of the array that this weight stands for, whatever that of the matrices.
    """

    number: Array = canonical()
    distinct: Array = shared()
    layout: Layout = static()
    of_dtype: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """The whole stack."""
        w = over_stack(lambda number: self.distinct[number], len(self.layout.stack))(self.number)
        return to_logical(w, self.layout).astype(self.dtype)

    def cast(self, dtype: Any) -> "Repeated":
        """The same matrices, whose stack has another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))


def numbers_of_layers(layers: Sequence[int], inner: tuple[int, ...]) -> Array:
    """The numbers `[L, *inner]` of the matrices of layers, where each layer has a stack of its own."""
    each = int(np.prod(inner))
    first = np.asarray(layers).reshape(-1, *(1,) * len(inner)) * each
    return jnp.asarray(first + np.arange(each).reshape(inner), jnp.int32)
