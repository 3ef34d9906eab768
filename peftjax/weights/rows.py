"""A matrix of which some rows (token embeddings) are exchanged for trained ones."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.arrange import outputs_in_result, side_of
from peftjax.weights.base import Weight, canonical, contract, dense, logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.rules import Conv, Dot, Gather, RaggedDot, Rule


@structured
class TrainedRows(Weight):
    """`w = base` with rows `rows` replaced by `values [n, out]`; a tied output layer follows.

    Only plain matrices `[in, out]` and their transposes. A lookup keeps nothing more for the backward
    pass; a tied product keeps its input.
    """

    base: Any = logical()
    values: Array = canonical("o")
    layout: Layout = static()
    rows: tuple[int, ...] = static()

    def dense(self) -> Array:
        """The base with the rows in place."""
        values = self.values.astype(self.dtype)
        index = jnp.asarray(self.rows)
        if self.layout.letters == "io":
            return dense(self.base).at[index].set(values)
        return dense(self.base).at[:, index].set(values.T)

    def supports(self, rule: Rule) -> bool:
        """Lookups of rows and products over the outputs; a product over the inputs merges lazily."""
        if sorted(self.layout.letters) != ["i", "o"] or isinstance(rule, Conv | RaggedDot):
            return False
        if isinstance(rule, Gather):
            return side_of(self.layout, (rule.axis,)) == "i"
        return side_of(self.layout, rule.w_contract) is not None

    def dot(self, x: Array, rule: Dot) -> Array:
        """`x·baseᵀ` with the trained rows' results in place of the old."""
        if side_of(self.layout, rule.w_contract) == "i":
            return super().dot(x, rule)
        y = contract(x, self.base, rule)
        values = self.values if self.layout.letters == "io" else self.values.T
        exchanged = rule(x, values.astype(x.dtype)).astype(y.dtype)
        (axis,) = outputs_in_result(rule, self.layout, y.ndim)
        return y.at[(slice(None),) * axis + (jnp.asarray(self.rows),)].set(exchanged)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows, the trained ones in place."""
        found = contract(indices, self.base, rule)
        hits = indices == jnp.asarray(self.rows)  # [*batch, n]: the last axis of indices has size 1
        hit = jnp.any(hits, axis=-1)
        # A place past the end reads zeros: the sum keeps these numbers alone, a choice would keep masks.
        place = jnp.where(hit, jnp.argmax(hits, axis=-1), len(self.rows))
        trained = self.values.astype(found.dtype).at[place].get(mode="fill", fill_value=0)
        return jnp.where(hit[..., None], jnp.zeros((), found.dtype), found) + trained
