"""A low-rank weight whose first factor is constant in each group of inputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from peftjax.weights.base import Weight, contract
from peftjax.weights.canonical import side_of
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank, low_rank_dot
from peftjax.weights.sharding import like


@structured
class PooledLowRank(Weight):
    """`w = base + scale · aᵀ b` with `a [*stack, r, groups]` repeated for each of `group` neighboring inputs.

    A product over the inputs sums x within each group first, and keeps the sums, in / group numbers a token,
    and the thin product. Every other product is that of the equal `LowRank`.
    """

    base: Any = logical()
    a: Array = canonical()
    b: Array = canonical("o")
    layout: Layout = static()
    scale: float = static(default=1.0)
    group: int = static(default=1)

    def as_low_rank(self) -> LowRank:
        """The same weight with a column of `a` for each input."""
        n = self.layout.matrix[0]
        return LowRank(
            self.base, jnp.repeat(self.a, self.group, -1)[..., :n], self.b, self.layout, self.scale
        )

    def dense(self) -> Array:
        """`base + scale · aᵀ b`, in the base's dtype."""
        return self.as_low_rank().dense()

    def supports(self, rule: Contraction) -> bool:
        """What the equal low-rank weight supports."""
        return self.as_low_rank().supports(rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product, and that of the sums of x."""
        inputs = self.layout.positions("i")
        if side_of(self.layout, rule.w_contract) != "i" or len(inputs) > 1:
            return contract(x, self.as_low_rank(), rule)
        y = contract(x, self.base, rule)
        (axis,) = rule.x_contract
        sizes = list(self.shape)
        sizes[inputs[0]] = self.a.shape[-1]
        pooled = self._pooled(x, axis)
        delta = low_rank_dot(pooled, self.a, self.b, self.scale, rule, self.layout.resized(sizes), "i")
        return y + like(delta.astype(y.dtype), y)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """Rows of the equal low-rank weight."""
        return contract(indices, self.as_low_rank(), rule)

    def conv(self, x: Array, rule: Conv) -> Array:
        """The convolution of the equal low-rank weight."""
        return contract(x, self.as_low_rank(), rule)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The ragged product of the equal low-rank weight."""
        return contract(x, self.as_low_rank(), rule)

    def slice_features(self, position: int, cut: range) -> Any:
        """A slice of outputs; one of inputs is of the equal low-rank weight."""
        if self.layout.axes[position].kind == "i":
            return self.as_low_rank().slice_features(position, cut)
        return super().slice_features(position, cut)

    def reverse(self, position: int) -> Any:
        """Reversed outputs; reversed inputs are of the equal low-rank weight."""
        if self.layout.axes[position].kind == "i":
            return self.as_low_rank().reverse(position)
        return super().reverse(position)

    def as_stack(self, position: int) -> Any:
        """A stack of outputs; one of inputs is of the equal low-rank weight."""
        if self.layout.axes[position].kind == "i":
            return self.as_low_rank().as_stack(position)
        return super().as_stack(position)

    def part_specs(self, spec: PartitionSpec) -> "PooledLowRank | None":
        """None where inputs are divided: a group may lie on two devices."""
        return None if self.divides(spec, ("i",)) else super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "PooledLowRank | None":
        """None for inputs, which are never divided."""
        outputs = self.layout.axes[position].kind == "o"
        return super().gather_features(position, mesh_axes, fn, size) if outputs else None

    def cast(self, dtype: Any) -> "PooledLowRank":
        """The base in another dtype; the factors stay as exact as they are."""
        base = self.base.cast(dtype) if isinstance(self.base, Weight) else self.base.astype(dtype)
        return replace(self, base=base)

    def _pooled(self, x: Array, axis: int) -> Array:
        """Sums of x over neighbors along an axis, the last group being what is left."""
        short = -x.shape[axis] % self.group
        x = jnp.pad(x, [(0, short if n == axis else 0) for n in range(x.ndim)])
        return x.reshape(*x.shape[:axis], -1, self.group, *x.shape[axis + 1 :]).sum(axis + 1)
