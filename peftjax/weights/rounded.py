"""A trained weight that a model sees rounded to a format of codes."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import tree
from peftjax.core.derivatives import with_backward
from peftjax.quantize.codes import decode
from peftjax.quantize.groups import Format
from peftjax.weights.base import Weight, dense
from peftjax.weights.coding import rows_of
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.quantized import Quantized, quantize
from peftjax.weights.sharding import like
from peftjax.weights.views import WholeMatrices

LARGEST_LOG = math.log(4)
"""Of a trained factor of a step, or of a number before it is rounded."""


@structured
class Rounded(WholeMatrices, Weight):
    """`w = decode(encode(base))`, whose gradient is the base's where that is within reach of the codes.

    Without a `step` ranges are those of the base at hand, and constants in the gradient. With one the scales
    are `step · exp(log_step)`, and their gradient is that of LSQ (arXiv 1902.08153):

        d log_step = Σ dw ∘ (w - base·1[within])        of each group

    A number that rounds to a code is within reach; one that is cut off to the outermost code gets no
    gradient, but for ranges that are of a mean: all are within those. Backward rounds the base again. A part
    of a matrix would have other ranges.

    Attributes:
        base: an array, or a weight with an adapter.
        layout: of the logical axes.
        format: of the codes.
        rows: the side whose axes the rows of the codes are.
        of_dtype: of the array that it stands for; the codes are of the base in its own dtype.
        step: scales at the start, float32 `[*stack, rows, groups]`.
        log_step: the logarithm of what they are multiplied by, float32 of that shape, cut to ±log 4.
        zeros: the zero points, uint8 of that shape, of a format that has them and a grid of its own.
    """

    base: Any = logical()
    layout: Layout = static()
    format: Format = static()
    rows: Side = static()
    of_dtype: Any = static()
    step: Array | None = canonical(default=None)
    log_step: Array | None = canonical(default=None)
    zeros: Array | None = canonical(default=None)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def quantized(self) -> Quantized:
        """The codes that the base is rounded to."""
        base = lax.stop_gradient(dense(self.base))
        grid = None if self.step is None else (lax.stop_gradient(self._scales()), self.zeros)
        return quantize(base, self.layout, self.format, rows=self.rows, grid=grid).cast(self.dtype)

    def dense(self) -> Array:
        """The rounded array."""
        coded = self.quantized()
        scales = None if self.step is None else self._scales()

        def value(base: Array, scales: Array | None, coded: Quantized) -> Array:
            return coded.dense()

        def forward(base: Array, scales: Array | None, coded: Quantized) -> tuple[Array, Any]:
            return coded.dense(), (base, coded)

        def backward(kept: tuple[Array, Quantized], g: Array) -> tuple[Array, Array | None, None]:
            base, coded = kept
            passed = jnp.where(_within(base, coded), g, 0)
            of_scales = None if scales is None else _to_scales(base, coded, g, passed)
            return passed.astype(base.dtype), of_scales, None

        return with_backward(value, forward, backward)(dense(self.base), scales, coded)

    def _scales(self) -> Array:
        """The trained scales."""
        assert self.step is not None
        assert self.log_step is not None
        return self.step * jnp.exp(bounded(self.log_step))

    def cast(self, dtype: Any) -> "Rounded":
        """The same codes, decoded to another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))


def with_codes(params: Any) -> Any:
    """Parameters as `apply` gives them, with what they are rounded to as codes."""
    return tree.map_named(lambda _, leaf: leaf.quantized() if isinstance(leaf, Rounded) else leaf, params)


def near_a_boundary(w: Array, layout: Layout, form: Format, share: float) -> Array:
    """Which numbers of an array another code is nearest to once they move by that share of their scale."""
    rows, exact = rows_of(layout), w.astype(jnp.float32)
    coded = quantize(exact, layout, form, rows=rows)
    grid = (decode(coded.codes.scales).astype(jnp.float32), coded.codes.zeros)
    move = share * coded.arranged(coded.codes.by_number(grid[0]))

    def units(moved: Array) -> Array:
        codes = quantize(moved, layout, form, rows=rows, grid=grid).codes
        return coded.arranged(codes.units)

    return units(exact + move) != units(exact - move)


def bounded(log: Array) -> Array:
    """The logarithm of a trained factor, cut to ±log 4, beyond which it gets no gradient."""
    return jnp.clip(log, -LARGEST_LOG, LARGEST_LOG)


def _to_scales(base: Array, coded: Quantized, g: Array, passed: Array) -> Array:
    """The gradient of the scales `[*stack, rows, groups]`, of one for w and what of that reaches the base.

    A unit is `w/s` of a scale s, and `base/s` where that moves with s.
    """
    codes = coded.codes
    scales = decode(codes.scales).astype(jnp.float32)
    inverse = coded.arranged(codes.by_number(1 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)))
    units = coded.arranged(codes.units)
    g, passed, base = (part.astype(jnp.float32) for part in (g, passed, base))
    each, pull = jax.vjp(lambda scales: coded.arranged(codes.by_number(scales)), scales)
    return pull(like(g * units - passed * base * inverse, each))[0]


def _within(base: Array, coded: Quantized) -> Array:
    """Which numbers of an array are within reach of codes."""
    if coded.codes.format.range == "mean":
        return jnp.ones(base.shape, bool)  # those beyond come in as the mean grows
    low, high = map(coded.arranged, coded.codes.limits)
    base = base.astype(jnp.float32)
    return (base >= low) & (base <= high)
