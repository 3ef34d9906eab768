"""Codes whose groups have a trained change of their scales."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from peftjax.core import compat
from peftjax.core.derivatives import with_backward
from peftjax.quantize.codes import Codes, decode
from peftjax.quantize.groups import GroupCodes
from peftjax.weights.base import Weight, contract, lazily_merged
from peftjax.weights.contraction import Dot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.quantized import Quantized


@structured
class GroupScaled(Weight):
    """`w = (scale_g + change_g) · unit`, the units being what the codes stand for before their scale.

    A product keeps x, codes and scales. Its backward pass decodes the weight for the gradient of x, and holds
    the gradient of one weight until each group's is summed.

    Attributes:
        base: the codes and the scales at the start.
        layout: of the logical axes.
        by_output: the changes `[*stack, groups, out]`, where the rows of the codes are the outputs.
        by_input: or `[*stack, groups, in]`, where they are the inputs.
    """

    base: Quantized = logical()
    layout: Layout = static()
    by_output: Array | None = canonical("o", default=None)
    by_input: Array | None = canonical("i", default=None)

    @property
    def change(self) -> Array:
        """Of the scales, a row for each group."""
        change = self.by_output if self.by_output is not None else self.by_input
        assert change is not None
        return change

    def codes(self, change: Array) -> GroupCodes:
        """The codes with other scales."""
        scales = decode(self.base.codes.scales).astype(jnp.float32)
        return replace(self.base.codes, scales=scales + change.swapaxes(-1, -2))

    def dense(self) -> Array:
        """The decoded array."""
        return self.base.decoded(self.codes(self.change))

    def dot(self, x: Array, rule: Dot) -> Array:
        """The product with the codes; backward keeps x, and no weight."""

        def product(x: Array, change: Array, weight: GroupScaled) -> Array:
            return contract(x, replace(weight.base, codes=weight.codes(change)), rule)

        def forward(x: Array, change: Array, weight: GroupScaled) -> tuple[Array, Any]:
            return product(x, change, weight), (x, change, weight)

        def backward(kept: Any, g: Array) -> tuple[Array, Array, None]:
            x, change, weight = kept
            _, pull = jax.vjp(lambda x: product(x, change, weight), x)
            _, pull_change = jax.vjp(lambda c: rule(x, weight.base.decoded(weight.codes(c))), change)
            return *pull(g), *pull_change(g), None

        if rule.out_sharding is not None:
            return lazily_merged(rule, x, self)
        frozen = jax.tree.map(jax.lax.stop_gradient, self)
        return with_backward(product, forward, backward)(*compat.varying_alike((x, self.change, frozen)))

    def cast(self, dtype: Any) -> "GroupScaled":
        """The same codes decoded to another dtype; the changes stay as exact as they are."""
        return replace(self, base=self.base.cast(dtype))

    def slice_features(self, position: int, cut: range) -> "GroupScaled | None":
        """A slice of rows, or one of whole groups."""
        view = super().slice_features(position, cut)
        if view is None or self.layout.axes[position].kind == self.base.rows:
            return view
        start = cut.start // self.base.codes.group
        stop = start + view.base.codes.scales.shape[-1]
        return view._with_change(self.change[..., start:stop, :])

    def part_specs(self, spec: PartitionSpec) -> "GroupScaled | None":
        """The changes divided as the scales are."""
        specs = super().part_specs(spec)
        if specs is None:
            return None
        of_scales = specs.base.codes.scales
        *stack, row, groups = of_scales.codes if isinstance(of_scales, Codes) else of_scales
        return specs._with_change(PartitionSpec(*stack, groups, row))

    def divided_with(self, activations: Any) -> "GroupScaled":
        """With scales that are floats, as the changes."""
        return replace(self, base=self.base.divided_with(activations))

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "GroupScaled | None":
        """The weight with its rows, or whole groups of each, gathered."""
        if self.layout.axes[position].kind == self.base.rows:
            return super().gather_features(position, mesh_axes, fn, size)
        base = self.base.gather_features(position, mesh_axes, fn, size)
        if base is None:
            return None
        view = replace(self, base=base, layout=base.layout)
        return view._with_change(fn(self.change, self.change.ndim - 2))

    def _with_change(self, change: Any) -> "GroupScaled":
        by_output = self.by_output is not None
        return replace(self, **{"by_output" if by_output else "by_input": change})
