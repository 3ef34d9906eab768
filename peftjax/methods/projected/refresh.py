"""New projectors from the gradient of one batch, which is whole for one parameter at a time or not at all.

The leading singular subspace of a gradient G is found by one of

- 'subspace': randomised subspace iteration from the projector before. What it needs of G are products with a
  few vectors, and they are gradients of factors: with `y = x·W + (x·qᵀ)·b` at b = 0, dL/db = q G, and with
  `y = x·W + (x·aᵀ)·w` at a = 0, dL/da = w Gᵀ. All matrices share the passes, 2·iterations + 1 of them.
- 'svd', 'gram': exactly, a pass for each parameter, whose gradient exists alone and only then.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax import tree
from peftjax.methods.projected.matrices import P, Projected, Q
from peftjax.methods.targets import key_for
from peftjax.optim import bases
from peftjax.weights.arrange import to_canonical
from peftjax.weights.low_rank import LowRank

Basis = Literal["auto", "subspace", "gram", "svd"]
BASES: tuple[Basis, ...] = ("auto", "subspace", "gram", "svd")
Loss = Callable[[Any], Array]
Slots = Mapping[str, Mapping[str, Array]]
OVERSAMPLING = 8
"""Rows of a subspace iteration beyond the rank."""
SMALL = 512
"""The largest compressed side for which 'auto' decomposes the gradient itself."""


def method_for(target: Projected, basis: Basis) -> Basis:
    """How a target's basis is found: 'auto' decomposes small matrices exactly and iterates on large ones."""
    if basis != "auto":
        return basis
    return "svd" if _compressed(target) <= SMALL else "subspace"


def new_projectors(
    loss: Loss,
    params: Any,
    plan: Sequence[Projected],
    slots: Slots,
    *,
    basis: Basis,
    iterations: int,
    key: Array,
) -> dict[str, dict[str, Array]]:
    """The projectors `{path: {"p": ..., "q": ...}}` of the gradients at the weights in `slots`.

    The largest entry of every row is positive: kept moments belong to directions, and must not depend on the
    signs that a decomposition, or a machine, happens to give.

    Args:
        loss: `params -> scalar`.
        params: all parameters, with the weights of `slots` in their place.
        plan: the targets.
        slots: theirs, z settled.
        basis: how.
        iterations: of a subspace iteration.
        key: of its random rows.
    """
    found: dict[str, Array] = {}
    for target in plan:
        how = method_for(target, basis)
        if how == "subspace":
            continue
        decompose = bases.svd_basis if how == "svd" else bases.gram_basis
        # One after the other: this pass begins when the basis of the one before is there.
        params, found = lax.optimization_barrier((params, found))
        g = _whole_gradient(loss, params, target)
        first = decompose(g, target.rank, _side(target))
        found[target.path] = first
    iterated = [target for target in plan if target.path not in found]
    if iterated:
        found |= _iterated(loss, params, iterated, slots, iterations, key)
    projectors = {t.path: {P if _side(t) == "input" else Q: found[t.path]} for t in plan}
    both = [target for target in plan if target.side == "both"]
    if both:
        rows = _products(loss, params, {t.path: (t, "input", found[t.path]) for t in both})
        for path, b in rows.items():
            projectors[path][Q] = bases.orthonormal_rows(b)
    return {
        path: {name: _pointed(rows).astype(slots[path][name].dtype) for name, rows in own.items()}
        for path, own in projectors.items()
    }


def _pointed(rows: Array) -> Array:
    largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=-1, keepdims=True), axis=-1)
    return jnp.where(largest < 0, -rows, rows)


def _side(target: Projected) -> Literal["input", "output"]:
    return "output" if target.side == "output" else "input"


def _compressed(target: Projected) -> int:
    return target.layout.matrix[_side(target) == "output"]


def _whole_gradient(loss: Loss, params: Any, target: Projected) -> Array:
    """`dL/dW [*stack, in, out]` of one parameter."""
    weight = tree.named_leaves(params)[target.path]
    gradient = jax.grad(lambda w: loss(tree.replace(params, {target.path: w})))(weight)
    return to_canonical(gradient, target.layout)


def _iterated(
    loss: Loss, params: Any, plan: Sequence[Projected], slots: Slots, iterations: int, key: Array
) -> dict[str, Array]:
    of = {target.path: target for target in plan}

    def start(target: Projected) -> Array:
        known = slots[target.path][P if _side(target) == "input" else Q]
        rows = min(target.rank + OVERSAMPLING, min(target.layout.matrix))
        shape = (*target.stack, rows, known.shape[-1])
        return bases.start_rows(key_for(key, target.path), shape, known)

    def entering(other: bool) -> Callable[[dict[str, Array]], dict[str, Array]]:
        def products(rows: dict[str, Array]) -> dict[str, Array]:
            sides = {path: ("input", "output")[(_side(of[path]) == "output") != other] for path in rows}
            return _products(loss, params, {path: (of[path], sides[path], rows[path]) for path in rows})

        return products

    starts = {target.path: start(target) for target in plan}
    ranks = {target.path: target.rank for target in plan}
    return bases.subspace_iteration(entering(False), entering(True), starts, iterations, ranks)


def _products(loss: Loss, params: Any, rows: Mapping[str, tuple[Projected, str, Array]]) -> dict[str, Array]:
    """`q G` for rows q of the input side, `w Gᵀ` for rows w of the output side, by one gradient pass."""
    leaves = tree.named_leaves(params)

    def shape(target: Projected, side: str, given: Array) -> tuple[int, ...]:
        return (*given.shape[:-1], target.layout.matrix[side == "input"])

    def through(offsets: dict[str, Array]) -> Array:
        weights = {}
        for path, (target, side, given) in rows.items():
            a, b = (given, offsets[path]) if side == "input" else (offsets[path], given)
            weights[path] = LowRank(leaves[path], a, b, target.layout)
        return loss(tree.replace(params, weights))

    return jax.grad(through)({path: jnp.zeros(shape(*one), jnp.float32) for path, one in rows.items()})
