"""Weights whose gradient is what they were given: sums over activations that met them, or gradients."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.weights.canonical import side_of
from peftjax.weights.contraction import Contraction, Dot
from peftjax.weights.fields import structured
from peftjax.weights.layout import Layout
from peftjax.weights.mapped import Mapped


@structured
class Observed(Mapped):
    """`w = base`; the cotangents of its slots are sums over the rows x of activations.

    Those of `count`, `sum` and `moment` are `Σ m`, `Σ m x` and `Σ m xᵀx`, float32, m a row's `mask`. They
    do not depend on the cotangent of the result, which has to be there: what the function's value does
    not depend on adds nothing. Of a weight whose map is after it, that of `moment` is `Σ m gᵀg`, g the
    cotangents of the rows of its results.
    """

    def supports(self, rule: Contraction) -> bool:
        """Products whose activation meets all of the inputs, with one matrix of a stack for each row."""
        if not isinstance(rule, Dot) or set(rule.w_batch) != set(self.layout.positions("s")):
            return False
        return side_of(self.layout, rule.w_contract) == "i" and super().supports(rule)


def observed(base: Any, layout: Layout, mask: Array | None = None) -> Observed:
    """The weight with sums of zero.

    Args:
        base: an array or weight.
        layout: of its axes.
        mask: of the rows, in the shape of the activation without its last axis; by default all count.
    """
    stack, n = layout.stack, layout.matrix[0]
    slots = {"count": jnp.zeros(stack), "sum": jnp.zeros((*stack, n)), "moment": jnp.zeros((*stack, n, n))}
    return Observed(base, _masked(slots, layout, mask), layout, _observe, "before")


def with_observed_gradients(base: Any, layout: Layout, mask: Array | None = None) -> Observed:
    """The weight with a sum of zero, `moment` `[*stack, out, out]`, over the cotangents of its results.

    Args:
        base: as of `observed`; that of inputs and this one can be put around one weight.
        layout: of its axes.
        mask: as there.
    """
    stack, m = layout.stack, layout.matrix[1]
    slots = _masked({"moment": jnp.zeros((*stack, m, m))}, layout, mask)
    return Observed(base, slots, layout, _observe_gradients, "after")


def _masked(slots: dict[str, Array], layout: Layout, mask: Array | None) -> dict[str, Array]:
    if mask is None:
        return slots
    return {**slots, "mask": jnp.broadcast_to(mask.astype(jnp.float32), (*layout.stack, *mask.shape))}


@jax.custom_vjp
def _observe(slots: Mapping[str, Array], x: Array) -> Array:
    return x


@jax.custom_vjp
def _observe_gradients(slots: Mapping[str, Array], y: Array) -> Array:
    return y


def _mask_of(slots: Mapping[str, Array], x: Array) -> Array | None:
    mask = slots.get("mask")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise PeftError(
            f"a mask of shape {mask.shape} does not fit an activation of shape {x.shape}; give one of shape "
            f"{x.shape[:-1]}, or none"
        )
    return mask


def _weighed(mask: Array | None, x: Array) -> tuple[Array, Array, Array]:
    """The rows of x in float32, how much each counts, and `Σ m xᵀx`."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    counted = jnp.ones(len(rows)) if mask is None else mask.reshape(-1)
    moment = jnp.matmul((counted[:, None] * rows).T, rows, precision=lax.Precision.HIGHEST)
    return rows, counted, moment


def _backward(kept: tuple[Array | None, Array], g: Array) -> tuple[dict[str, Array], Array]:
    mask, x = kept
    rows, counted, moment = _weighed(mask, x)
    sums = {"count": counted.sum(), "sum": (counted[:, None] * rows).sum(0), "moment": moment}
    return (sums if mask is None else {**sums, "mask": jnp.zeros_like(mask)}), g


def _gradients_backward(mask: Array | None, g: Array) -> tuple[dict[str, Array], Array]:
    sums = {"moment": _weighed(mask, g)[2]}
    return (sums if mask is None else {**sums, "mask": jnp.zeros_like(mask)}), g


_observe.defvjp(lambda slots, x: (x, (_mask_of(slots, x), x)), _backward)
_observe_gradients.defvjp(lambda slots, y: (y, _mask_of(slots, y)), _gradients_backward)
