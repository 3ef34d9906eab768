"""A trained weight that a model sees rounded to a format of codes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from peftjax.core import tree
from peftjax.core.derivatives import with_backward
from peftjax.quantize.groups import Format
from peftjax.weights.base import Weight, dense
from peftjax.weights.fields import logical, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.quantized import Quantized, quantize


@structured
class Rounded(Weight):
    """`w = decode(encode(base))`, whose gradient is the base's where that is within reach of the codes.

    Ranges are those of the base at hand, and constants in the gradient. A number that rounds to a code is
    within reach; one that is cut off to the outermost code gets no gradient. Backward rounds the base again.

    Attributes:
        base: an array, or a weight with an adapter.
        layout: of the logical axes.
        format: of the codes.
        rows: the side whose axes the rows of the codes are.
        of_dtype: of the array that it stands for; the codes are of the base in its own dtype.
    """

    base: Any = logical()
    layout: Layout = static()
    format: Format = static()
    rows: Side = static()
    of_dtype: Any = static()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def quantized(self) -> Quantized:
        """The codes that the base is rounded to."""
        base = lax.stop_gradient(dense(self.base))
        return quantize(base, self.layout, self.format, rows=self.rows).cast(self.dtype)

    def dense(self) -> Array:
        """The rounded array."""
        coded = self.quantized()

        def forward(base: Array, coded: Quantized) -> tuple[Array, tuple[Array, Quantized]]:
            return coded.dense(), (base, coded)

        def backward(kept: tuple[Array, Quantized], g: Array) -> tuple[Array, None]:
            base, coded = kept
            return jnp.where(_within(base, coded), g, 0).astype(base.dtype), None

        return with_backward(lambda base, coded: coded.dense(), forward, backward)(dense(self.base), coded)

    def cast(self, dtype: Any) -> "Rounded":
        """The same codes, decoded to another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))

    def slice_features(self, position: int, cut: range) -> None:
        """None: a part of a group has another range."""

    def reverse(self, position: int) -> "Rounded | None":
        """A reversed stack."""
        return super().reverse(position) if self.layout.axes[position].kind in "s1" else None

    def as_stack(self, position: int) -> None:
        """None: a part of a group has another range."""

    def part_specs(self, spec: PartitionSpec) -> "Rounded | None":
        """None where inputs or outputs are divided: a part of a group has another range."""
        full = (*spec, *(None,) * (self.ndim - len(spec)))
        divided = any(full[p] is not None for p in (*self.layout.positions("i"), *self.layout.positions("o")))
        return None if divided else super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: Sequence[str], fn: Callable[[Array, int], Array], size: int
    ) -> None:
        """None, as there are no divided features."""


def with_codes(params: Any) -> Any:
    """Parameters as `apply` gives them, with what they are rounded to as codes."""
    return tree.map_named(lambda _, leaf: leaf.quantized() if isinstance(leaf, Rounded) else leaf, params)


def _within(base: Array, coded: Quantized) -> Array:
    """Which numbers of an array are within reach of codes."""
    low, high = map(coded.arranged, coded.codes.limits)
    base = base.astype(jnp.float32)
    return (base >= low) & (base <= high)
