"""The weights whose gradients are projected: which sides, with which slots, as which structured weight."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.methods._targets import find_targets, key_for
from peftjax.optim.bases import Side, orthonormal_rows
from peftjax.optim.refresh import Compressed, Projected, sides_of
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.low_rank import LowRank
from peftjax.weights.scaled import Scaled

Slots = Mapping[str, Array]
WEIGHT, SHRINK, Z = "weight", "shrink", "z"
BASIS: dict[Side, str] = {"input": "p", "output": "q"}
"""The slots of the bases."""
STEERED = (WEIGHT, SHRINK, *BASIS.values())
"""The slots of a projected weight that have no gradient."""


def find_matrices(params: Any, *, who: str, side: Compressed, **where: Any) -> list[Projected]:
    """The targets (see `peftjax.methods._targets`) with the sides that are compressed."""
    found = find_targets(params, who=who, layers=None, layers_pattern=None, **where)
    return [Projected(t.path, t.layout, t.rank, sides_of(side, *t.layout.matrix)) for t in found]


def start_slots(who: str, key: Array, target: Projected, leaf: Any, dtype: Any) -> dict[str, Array]:
    """The weight of a target, and projectors before its first gradient is known: random orthonormal ones.

    Raises:
        PeftError: the leaf is a structured weight.
    """
    if isinstance(leaf, Weight):
        raise PeftError(
            f"{who}: {target.path!r} is a {type(leaf).__name__}, and {who} trains the weight itself; exclude "
            "it here or from the method before"
        )
    slots = {WEIGHT: leaf}
    own = key_for(key, target.path)
    for side, subkey in zip(target.sides, jax.random.split(own)):
        random = jax.random.normal(subkey, (*target.layout.stack, target.rank, target.width(side)))
        slots[BASIS[side]] = orthonormal_rows(random).astype(dtype)
    return slots


def opened(slots: Slots) -> dict[str, Array]:
    """The slots with a z of zero and a shrink of one, if they are those of a projected weight without."""
    bases = [slots[name] for name in BASIS.values() if name in slots]
    if Z in slots or not bases:
        return dict(slots)
    *stack, rank, width = bases[0].shape
    other = rank if len(bases) == 2 else slots[WEIGHT].size // (math.prod(stack) * width)
    z = jnp.zeros((*stack, rank, other), bases[0].dtype)
    return {**slots, SHRINK: jnp.ones(stack, jnp.float32), Z: z}


def closed(target: Projected, slots: Slots, scale: float) -> dict[str, Array]:
    """The slots without z and shrink, which are put into the weight."""
    return {name: slot for name, slot in settled(target, slots, scale).items() if name not in (Z, SHRINK)}


def weight_of(target: Projected, slots: Slots, scale: float) -> LowRank | Array:
    """`shrink · W + scale · pᵀz` (`zᵀq`; `pᵀ z q`), of which z alone has a gradient; W where it is closed."""
    if Z not in slots:
        return lax.stop_gradient(slots[WEIGHT])
    fixed = {name: lax.stop_gradient(slots[name]) for name in STEERED if name in slots}
    a, b = factors_of(target, {**fixed, Z: slots[Z]})
    base = Scaled(fixed[WEIGHT], fixed[SHRINK], target.layout)
    return LowRank(base, a, b, target.layout, scale)


def factors_of(target: Projected, slots: Slots) -> tuple[Array, Array]:
    """`a [*stack, r, in]` and `b [*stack, r, out]` with `aᵀb` what z stands for."""
    p, q = (slots.get(name) for name in BASIS.values())
    if q is None:
        return p, slots[Z]
    if p is None:
        return slots[Z], q
    return p, jnp.einsum("...rs,...so->...ro", slots[Z], q)


def bases_in(slots: Mapping[str, Slots]) -> dict[str, dict[Side, Array]]:
    """The bases among the slots of each weight, by side."""
    return {
        path: {side: own[name] for side, name in BASIS.items() if name in own} for path, own in slots.items()
    }


def settled(target: Projected, slots: Slots, scale: float) -> dict[str, Array]:
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
        new = (shrink * old + scale * delta).astype(weight.dtype)
        return lax.dynamic_update_index_in_dim(weight, new, number, 0)

    weight = lax.fori_loop(0, weight.shape[0], put, weight)
    weight = to_logical(weight.reshape(*stack, *target.layout.matrix), target.layout)
    return {
        **slots,
        WEIGHT: weight,
        SHRINK: jnp.ones_like(slots[SHRINK]),
        Z: jnp.zeros_like(slots[Z]),
    }
