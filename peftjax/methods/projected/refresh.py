"""New projectors from the gradient of one batch, which is whole for one parameter at a time or not at all.

The leading singular subspace of a gradient G is found by one of

- 'subspace': randomised subspace iteration from the projector before. What it needs of G are products with a
  few vectors, and they are gradients of factors: with `y = x·W + (x·qᵀ)·b` at b = 0, dL/db = q G, and with
  `y = x·W + (x·aᵀ)·w` at a = 0, dL/da = w Gᵀ. Parameters share the 2·iterations + 1 passes, all of them or
  `together` at a time, whose rows exist at once.
- 'svd', 'gram': exactly, a pass for each parameter, whose gradient exists alone and only then.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax import tree
from peftjax.methods.projected.matrices import BASIS
from peftjax.methods.targets import key_for
from peftjax.optim import bases
from peftjax.optim.bases import Side
from peftjax.optim.refresh import Method, Projected
from peftjax.weights.arrange import to_canonical
from peftjax.weights.low_rank import LowRank

Loss = Callable[[Any], Array]
Slots = Mapping[str, Mapping[str, Array]]
OVERSAMPLING = 8
"""Rows of a subspace iteration beyond the rank."""
SMALL = 512
"""The largest compressed side for which 'auto' decomposes the gradient itself."""


def method_for(target: Projected, basis: Method) -> Method:
    """How a target's basis is found: 'auto' decomposes small matrices exactly and iterates on large ones."""
    if basis != "auto":
        return basis
    return "svd" if target.width(target.first) <= SMALL else "subspace"


def new_projectors(
    loss: Loss,
    params: Any,
    plan: Sequence[Projected],
    slots: Slots,
    *,
    basis: Method,
    iterations: int,
    together: int | None,
    key: Array,
) -> dict[str, dict[str, Array]]:
    """The bases `{path: {"p": ..., "q": ...}}` of the gradients at the weights in `slots`.

    The largest entry of every row is positive: kept moments belong to directions, and must not depend on the
    signs that a decomposition, or a machine, happens to give.

    Args:
        loss: `params -> scalar`.
        params: all parameters, with the weights of `slots` in their place.
        plan: the targets.
        slots: theirs, z settled.
        basis: how.
        iterations: of a subspace iteration.
        together: how many parameters are iterated on at once; None is all.
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
        found[target.path] = decompose(g, target.rank, target.first)
    iterated = [target for target in plan if target.path not in found]
    size = together or max(len(iterated), 1)
    for start in range(0, len(iterated), size):
        params, found = lax.optimization_barrier((params, found))
        found |= _iterated(loss, params, iterated[start : start + size], slots, iterations, key)
    new = {target.path: {target.first: found[target.path]} for target in plan}
    both = [target for target in plan if len(target.sides) == 2]
    if both:
        rows = _products(loss, params, {t.path: (t, t.first, found[t.path]) for t in both})
        for target in both:
            other = next(side for side in target.sides if side != target.first)
            new[target.path][other] = bases.orthonormal_rows(rows[target.path])
    return {
        target.path: {
            BASIS[side]: _pointed(new[target.path][side]).astype(slots[target.path][BASIS[side]].dtype)
            for side in target.sides
        }
        for target in plan
    }


def _pointed(rows: Array) -> Array:
    largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=-1, keepdims=True), axis=-1)
    return jnp.where(largest < 0, -rows, rows)


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
        known = slots[target.path][BASIS[target.first]]
        rows = min(target.rank + OVERSAMPLING, *target.layout.matrix)
        shape = (*target.layout.stack, rows, known.shape[-1])
        return bases.start_rows(key_for(key, target.path), shape, known).astype(known.dtype)

    def entering(other: bool) -> Callable[[dict[str, Array]], dict[str, Array]]:
        def products(rows: dict[str, Array]) -> dict[str, Array]:
            sides: dict[str, Side] = {
                path: ("input", "output")[(of[path].first == "output") != other] for path in rows
            }
            return _products(loss, params, {path: (of[path], sides[path], rows[path]) for path in rows})

        return products

    starts = {target.path: start(target) for target in plan}
    ranks = {target.path: target.rank for target in plan}
    return bases.subspace_iteration(entering(False), entering(True), starts, iterations, ranks)


def _products(loss: Loss, params: Any, rows: Mapping[str, tuple[Projected, Side, Array]]) -> dict[str, Array]:
    """`q G` for rows q of the input side, `w Gᵀ` for rows w of the output side, by one gradient pass."""
    leaves = tree.named_leaves(params)

    def shape(target: Projected, side: Side, given: Array) -> tuple[int, ...]:
        return (*given.shape[:-1], target.layout.matrix[side == "input"])

    def through(offsets: dict[str, Array]) -> Array:
        weights = {}
        for path, (target, side, given) in rows.items():
            a, b = (given, offsets[path]) if side == "input" else (offsets[path], given)
            weights[path] = LowRank(leaves[path], a, b, target.layout)
        return loss(tree.replace(params, weights))

    return jax.grad(through)({path: jnp.zeros(shape(*one), one[2].dtype) for path, one in rows.items()})
