"""The weights whose gradients are projected: which sides, with which slots, as which structured weight."""

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
HELD = (WEIGHT, *BASIS.values())
"""The arrays of `frozen.state` of a projected weight, changed by a refresh."""


def find_matrices(params: Any, *, caller: str, side: Compressed, **where: Any) -> list[Projected]:
    """The targets (see `peftjax.methods._targets`) with the sides that are compressed."""
    found = find_targets(params, caller=caller, layers=None, layers_pattern=None, **where)
    return [Projected(t.path, t.layout, t.rank, sides_of(side, *t.layout.matrix)) for t in found]


def start_slots(name: str, key: Array, target: Projected, leaf: Any, dtype: Any) -> dict[str, Array]:
    """The state of a target at the start: its weight, and random projectors until the first gradient.

    Raises:
        PeftError: the leaf is a structured weight.
    """
    if isinstance(leaf, Weight):
        raise PeftError(
            f"{name}: {target.path!r} is a {type(leaf).__name__}, and {name} trains the weight itself; "
            "exclude it here or from the method before"
        )
    slots = {WEIGHT: leaf}
    own = key_for(key, target.path)
    for side, subkey in zip(target.sides, jax.random.split(own)):
        random = jax.random.normal(subkey, (*target.layout.stack, target.rank, target.width(side)))
        slots[BASIS[side]] = orthonormal_rows(random).astype(dtype)
    return slots


def nothing_learned(target: Projected, held: Slots) -> dict[str, Array]:
    """The trainable of a target right after a refresh: z of zero, a shrink of one."""
    basis = held[BASIS[target.first]]
    return {
        SHRINK: jnp.ones(target.layout.stack, jnp.float32),
        Z: jnp.zeros(target.shape, basis.dtype),
    }


def weight_of(target: Projected, held: Slots, trained: Slots, scale: float) -> LowRank | Array:
    """`shrink · W + scale · pᵀz` (`zᵀq`; `pᵀ z q`); W where nothing is trained beside it."""
    if Z not in trained:
        return held[WEIGHT]
    a, b = factors_of(target, held, trained[Z])
    # Only an optimizer's decay changes the shrink: it gets no gradient.
    base = Scaled(held[WEIGHT], lax.stop_gradient(trained[SHRINK]), target.layout)
    return LowRank(base, a, b, target.layout, scale)


def factors_of(target: Projected, held: Slots, z: Array) -> tuple[Array, Array]:
    """`a [*stack, r, in]` and `b [*stack, r, out]` with `aᵀb = pᵀz` (or `zᵀq`, or `pᵀ z q`)."""
    p, q = (held.get(name) for name in BASIS.values())
    if q is None:
        return p, z
    if p is None:
        return z, q
    return p, jnp.einsum("...rs,...so->...ro", z, q)


def bases_in(slots: Mapping[str, Slots]) -> dict[str, dict[Side, Array]]:
    """The bases among the slots of each weight, by side."""
    return {
        path: {side: own[name] for side, name in BASIS.items() if name in own} for path, own in slots.items()
    }


def folded(target: Projected, held: Slots, trained: Slots, scale: float) -> dict[str, Array]:
    """The state with z folded into the weight, matrix after matrix, in place if donated."""
    a, b = factors_of(target, held, trained[Z])
    stack = target.layout.stack
    parts = (trained[SHRINK], a, b)
    flat = [part.reshape(-1, *part.shape[len(stack) :]) for part in parts]
    weight = to_canonical(held[WEIGHT], target.layout).reshape(-1, *target.layout.matrix)

    def put(number: Array, weight: Array) -> Array:
        shrink, a, b = (lax.dynamic_index_in_dim(part, number, keepdims=False) for part in flat)
        delta = jnp.einsum("ri,ro->io", a, b, preferred_element_type=jnp.float32)
        old = lax.dynamic_index_in_dim(weight, number, keepdims=False)
        new = (shrink * old + scale * delta).astype(weight.dtype)
        return lax.dynamic_update_index_in_dim(weight, new, number, 0)

    weight = lax.fori_loop(0, weight.shape[0], put, weight)
    return {**held, WEIGHT: to_logical(weight.reshape(*stack, *target.layout.matrix), target.layout)}
