"""A weight whose gradient is what it was given: sums over the activations that met its inputs."""

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
    not depend on adds nothing.
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
    if mask is not None:
        slots["mask"] = jnp.broadcast_to(mask.astype(jnp.float32), (*stack, *mask.shape))
    return Observed(base, slots, layout, _observe, "before")


@jax.custom_vjp
def _observe(slots: Mapping[str, Array], x: Array) -> Array:
    return x


def _forward(slots: Mapping[str, Array], x: Array) -> tuple[Array, tuple[Array | None, Array]]:
    mask = slots.get("mask")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise PeftError(
            f"a mask of shape {mask.shape} does not fit an activation of shape {x.shape}; give one of shape "
            f"{x.shape[:-1]}, or none"
        )
    return x, (mask, x)


def _backward(kept: tuple[Array | None, Array], g: Array) -> tuple[dict[str, Array], Array]:
    mask, x = kept
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    counted = jnp.ones(len(rows)) if mask is None else mask.reshape(-1)
    weighed = counted[:, None] * rows
    moment = jnp.matmul(weighed.T, rows, precision=lax.Precision.HIGHEST)
    sums = {"count": counted.sum(), "sum": weighed.sum(0), "moment": moment}
    return (sums if mask is None else {**sums, "mask": jnp.zeros_like(mask)}), g


_observe.defvjp(_forward, _backward)
