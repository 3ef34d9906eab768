"""A weight of which some entries, anywhere in it, are exchanged for trained ones."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.weights.base import Weight, dense
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.in_place import with_gradient_at
from peftjax.weights.indexing import NOWHERE, numbered_backwards, numbered_in, put_entries, take_entries
from peftjax.weights.layout import Layout


@structured
class SparseEntries(Weight):
    """`w = base` with the entries (rows, columns) `[*stack, K]` exchanged for `values [*stack, K]`.

    With `added`, the values are what is added to the base's entries: in float32, before the result gets
    the base's (or the compute) dtype. Pairs are distinct; a row past the end is no entry.

    The dense weight is made for a layer's product and recomputed in the backward pass, which keeps the
    layer's input; the gradient of the values is taken from the layer's dense one. In a scan over layers, one
    layer at a time; a compiler may make those of an unrolled program sooner. With `in_place` the base holds
    the trained entries already, and no dense copy is made.
    """

    base: Any = logical()
    values: Array = canonical()
    rows: Array = canonical()
    columns: Array = canonical()
    layout: Layout = static()
    added: bool = static(default=False)
    in_place: bool = static(default=False)
    compute_dtype: Any = static(default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that the weight was cast to, or the base's."""
        return self.base.dtype if self.compute_dtype is None else self.compute_dtype

    def dense(self) -> Array:
        """The base with the entries in place."""
        base = dense(self.base)
        if self.in_place:
            taken = partial(take_entries, layout=self.layout)
            return with_gradient_at(
                taken, 1.0, base.astype(self.dtype), self.values, (self.rows, self.columns)
            )
        return put_entries(base.astype(self.dtype), self.rows, self.columns, self.entries(base), self.layout)

    def entries(self, base: Array) -> Array:
        """The trained entries themselves, float32 `[*stack, K]`."""
        if not self.added:
            return self.values
        return self.values + take_entries(base, self.rows, self.columns, self.layout).astype(jnp.float32)

    def changes(self, base: Array) -> Array:
        """What is added to the entries of the base, float32 `[*stack, K]`."""
        if self.added:
            return self.values
        return self.values - take_entries(base, self.rows, self.columns, self.layout).astype(jnp.float32)

    def cast(self, dtype: Any) -> "SparseEntries":
        """The same parts: the dense weight is cast when it is made, its entries from float32."""
        return replace(self, compute_dtype=jnp.dtype(dtype))

    def slice_features(self, position: int, cut: range) -> "SparseEntries | None":
        """The entries that lie in the slice."""
        view = super().slice_features(position, cut)
        if view is None:
            return None
        name = "rows" if self.layout.axes[position].kind == "i" else "columns"
        numbers = jnp.where(self.rows != NOWHERE, getattr(self, name), NOWHERE)
        return replace(view, **{name: numbered_in(numbers, cut)})

    def reverse(self, position: int) -> "SparseEntries | None":
        """The entries follow a reversed axis."""
        view, kind = super().reverse(position), self.layout.axes[position].kind
        if view is None or kind not in "io":
            return view
        name = "rows" if kind == "i" else "columns"
        return replace(view, **{name: numbered_backwards(getattr(self, name), self.layout, position)})

    def as_stack(self, position: int) -> None:
        """None: entries are numbered over all inputs and outputs."""
        return None

    def part_specs(self, spec: Any) -> "SparseEntries | None":
        """None where inputs or outputs are sharded: entries are numbered over all of them."""
        return None if self.divides(spec, ("i", "o")) else super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> None:
        """None: entries are numbered over all inputs and outputs."""
        return None
