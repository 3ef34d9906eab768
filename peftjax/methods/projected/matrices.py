"""The weights whose gradients are projected: which sides, with which slots, as which structured weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.errors import PeftError
from peftjax.methods.targets import Target, find_targets, key_for
from peftjax.optim.bases import orthonormal_rows
from peftjax.weights.arrange import to_canonical, to_logical
from peftjax.weights.base import Weight
from peftjax.weights.low_rank import LowRank
from peftjax.weights.shrunk import Shrunk

Sides = Literal["smaller", "larger", "input", "output", "both"]
SIDES: tuple[Sides, ...] = ("smaller", "larger", "input", "output", "both")
Slots = Mapping[str, Array]
WEIGHT, SHRINK, Z, P, Q = "weight", "shrink", "z", "p", "q"
STEERED = (WEIGHT, SHRINK, P, Q)
"""The slots of a projected weight that have no gradient."""


@dataclass(frozen=True, kw_only=True)
class Projected(Target):
    """A weight whose gradient is projected on its input side, its output side, or both."""

    side: Literal["input", "output", "both"]
    scale: float

    @property
    def z_shape(self) -> tuple[int, ...]:
        """Of the projected gradient: `[*stack, r, out]`, `[*stack, r, in]` or `[*stack, r, r]`."""
        n, m = self.layout.matrix
        return (*self.stack, self.rank, {"input": m, "output": n, "both": self.rank}[self.side])


def find_matrices(params: Any, *, who: str, side: Sides, scale: float, **where: Any) -> list[Projected]:
    """The targets (see `peftjax.methods.targets`) with the side that is compressed.

    'smaller' is the input side of a square matrix, 'larger' its output side.
    """
    found = find_targets(params, who=who, layers=None, layers_pattern=None, **where)

    def of(target: Target) -> Literal["input", "output", "both"]:
        n, m = target.layout.matrix
        if side in ("smaller", "larger"):
            return "input" if (n <= m) == (side == "smaller") else "output"
        return side

    return [Projected(**vars(target), side=of(target), scale=scale) for target in found]


def start_slots(who: str, key: Array, target: Projected, leaf: Any, dtype: Any) -> dict[str, Array]:
    """The slots of a target before its first gradient is known: random orthonormal projectors.

    Raises:
        PeftError: the leaf is a structured weight.
    """
    if isinstance(leaf, Weight):
        raise PeftError(
            f"{who}: {target.path!r} is a {type(leaf).__name__}, and {who} trains the weight itself; exclude "
            "it here or from the method before"
        )
    slots = {
        WEIGHT: leaf,
        SHRINK: jnp.ones(target.stack, jnp.float32),
        Z: jnp.zeros(target.z_shape, dtype),
    }
    for number, (name, size) in enumerate(zip((P, Q), target.layout.matrix)):
        if target.side == "both" or (target.side == "input") == (name == P):
            own = jax.random.fold_in(key_for(key, target.path), number)
            random = jax.random.normal(own, (*target.stack, target.rank, size))
            slots[name] = orthonormal_rows(random).astype(dtype)
    return slots


def weight_of(target: Projected, slots: Slots) -> LowRank:
    """`shrink · W + scale · pᵀz` (`zᵀq`; `pᵀ z q`), of which z alone has a gradient."""
    fixed = {name: lax.stop_gradient(slots[name]) for name in STEERED if name in slots}
    a, b = factors_of(target, {**fixed, Z: slots[Z]})
    base = Shrunk(fixed[WEIGHT], fixed[SHRINK], target.layout)
    return LowRank(base, a, b, target.layout, target.scale)


def factors_of(target: Projected, slots: Slots) -> tuple[Array, Array]:
    """`a [*stack, r, in]` and `b [*stack, r, out]` with `aᵀb` what z stands for."""
    if target.side == "input":
        return slots[P], slots[Z]
    if target.side == "output":
        return slots[Z], slots[Q]
    return slots[P], jnp.einsum("...rs,...so->...ro", slots[Z], slots[Q])


def settled(target: Projected, slots: Slots) -> dict[str, Array]:
    """The slots with what z has gathered put into the weight, matrix after matrix, in place if donated."""
    a, b = factors_of(target, slots)
    stack = target.layout.stack
    parts = (slots[SHRINK], a, b)
    flat = [part.reshape(-1, *part.shape[len(stack) :]) for part in parts]
    weight = to_canonical(slots[WEIGHT], target.layout).reshape(-1, *target.layout.matrix)

    def put(number: Array, weight: Array) -> Array:
        shrink, a, b = (lax.dynamic_index_in_dim(part, number, keepdims=False) for part in flat)
        delta = jnp.einsum("ri,ro->io", a, b, preferred_element_type=jnp.float32)
        old = lax.dynamic_index_in_dim(weight, number, keepdims=False)
        new = (shrink * old + target.scale * delta).astype(weight.dtype)
        return lax.dynamic_update_index_in_dim(weight, new, number, 0)

    weight = lax.fori_loop(0, weight.shape[0], put, weight)
    weight = to_logical(weight.reshape(*stack, *target.layout.matrix), target.layout)
    return {
        **slots,
        WEIGHT: weight,
        SHRINK: jnp.ones_like(slots[SHRINK]),
        Z: jnp.zeros_like(slots[Z]),
    }
