"""A low-rank weight whose columns are rescaled to trained lengths: DoRA's decomposition."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from peftjax.weights.base import Weight, dense
from peftjax.weights.canonical import side_of, side_to_logical
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank
from peftjax.weights.norms import rows_through, squared_norms_of_array


@structured
class ColumnNormalized(Weight):
    """`w = (magnitude / c) ∘ v`, v a `LowRank` and c the lengths of v's columns, not differentiated.

    `magnitude [*stack, out]`; c is computed without forming v, from the squared lengths `base_squares
    [*stack, out]` of the base's columns: `c² = ‖W‖² + 2s Σ_r b∘(aW) + s² Σ_r b∘((aaᵀ)b)`. Inside
    `shard_map` the sums over inputs go on over the axes `over` of the mesh, which divide the inputs.
    """

    base: LowRank = logical()
    magnitude: Array = canonical("o")
    base_squares: Array = canonical("o")
    layout: Layout = static()
    over: tuple[str, ...] = static(default=())

    def dense(self) -> Array:
        """The array, in the base's dtype."""
        gain = side_to_logical(self.gain(), self.layout, "o")
        return (dense(self.base) * gain).astype(self.dtype)

    def gain(self) -> Array:
        """`magnitude / c`, float32 `[*stack, out]`; its gradient is the magnitude's alone."""
        v = jax.tree.map(lax.stop_gradient, self.base)
        a, b = v.a.astype(jnp.float32), v.b.astype(jnp.float32)
        cross = jnp.sum(b * rows_through(a, v.base, self.layout), axis=-2)
        gram = jnp.einsum("...ri,...qi->...rq", a, a)
        if self.over:
            cross, gram = lax.psum((cross, gram), self.over)
        own = jnp.sum(b * jnp.einsum("...rq,...qo->...ro", gram, b), axis=-2)
        squares = self.base_squares + 2.0 * v.scale * cross + v.scale**2 * own
        # A column of zeros has length 0 and stays zero, as its magnitude is; rounding may go below.
        squares = jnp.maximum(squares, jnp.finfo(jnp.float32).tiny)
        return self.magnitude / jnp.sqrt(lax.stop_gradient(squares))

    def supports(self, rule: Contraction) -> bool:
        """What the low-rank weight inside supports; of experts, matrices that meet rows of x."""
        if isinstance(rule, RaggedDot) and not (rule.of_rows and self.layout.letters.count("o") == 1):
            return False
        if isinstance(rule, Dot) and side_of(self.layout, rule.w_contract) is None:
            return False  # a sum over a stack, whose columns have lengths of their own
        return self.base.supports(rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The low-rank product, scaled where the outputs are."""
        return self._scaled().dot(x, rule)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The low-rank rows, scaled."""
        return self._scaled().gather(indices, rule)

    def conv(self, x: Array, rule: Conv) -> Array:
        """The low-rank convolution, its channels scaled, or those of x where it meets the outputs."""
        return self._scaled().conv(x, rule)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The low-rank ragged product, each row of y, or of x where it meets the outputs, scaled."""
        return self._scaled().ragged_dot(x, rule)

    def _scaled(self) -> Diagonal:
        return Diagonal(self.base, self.layout, by_output=self.gain())

    def cast(self, dtype: Any) -> "ColumnNormalized":
        """The low-rank weight in another dtype; lengths stay as exact as they are."""
        return replace(self, base=self.base.cast(dtype))

    def slice_features(self, position: int, cut: range) -> "ColumnNormalized | None":
        """A slice of outputs; one of inputs would change the lengths, so there is none."""
        if self.layout.axes[position].kind != "o":
            return None
        return super().slice_features(position, cut)

    def as_stack(self, position: int) -> "ColumnNormalized | None":
        """A stack of outputs; one of inputs would change the lengths."""
        return super().as_stack(position) if self.layout.axes[position].kind == "o" else None

    def part_specs(self, spec: PartitionSpec) -> "ColumnNormalized | None":
        """As other weights'; the lengths are still those of whole columns."""
        specs = super().part_specs(spec)
        inputs = [spec[p] for p in self.layout.positions("i") if p < len(spec) and spec[p] is not None]
        names = [name for own in inputs for name in (own if isinstance(own, tuple) else (own,))]
        return None if specs is None else replace(specs, over=(*self.over, *names))

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "ColumnNormalized | None":
        """As other weights'; None for inputs that were whole: repeated ones change the lengths."""
        view = super().gather_features(position, mesh_axes, fn, size)
        if view is None or self.layout.axes[position].kind == "o":
            return view
        if not set(mesh_axes) <= set(self.over):
            return None
        return replace(view, over=tuple(name for name in self.over if name not in mesh_axes))


def column_squares(w: Any, layout: Layout) -> Array:
    """The squared length of every column (over all inputs) of a weight, float32 `[*stack, out]`."""
    return squared_norms_of_array(dense(w), layout, "i")
