"""The refresh of the bases by the gradient of one batch, never formed for all parameters at a time.

The leading singular subspace of a gradient G is found by one of

- 'subspace': randomized subspace iteration from the previous basis. It needs products of G with a few
  vectors, and these are gradients of factors: with `y = x·W + (x·qᵀ)·b` at b = 0, dL/db = q G, and with
  `y = x·W + (x·aᵀ)·w` at a = 0, dL/da = w Gᵀ. That is 2·iterations + 1 gradient passes.
- 'svd', 'gram': exactly, one gradient pass. A whole gradient takes less memory than the rows of an iteration
  where the rank is more than about an eighth of the side; 'auto' is 'gram' there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.methods._targets import key_for
from peftjax.methods.projected._matrices import BASIS, factors_of
from peftjax.optim import bases
from peftjax.optim.bases import Side
from peftjax.optim.refresh import Method, Projected, method_for
from peftjax.weights.canonical import to_canonical
from peftjax.weights.low_rank import LowRank
from peftjax.weights.norms import rows_through

Loss = Callable[[Any], Array]
Slots = Mapping[str, Mapping[str, Array]]
OVERSAMPLING = 8
"""Rows of a subspace iteration beyond the rank."""


def new_bases(
    loss: Loss,
    params: Any,
    targets: Sequence[Projected],
    slots: Slots,
    *,
    basis: Method,
    iterations: int,
    key: Array,
) -> dict[str, dict[str, Array]]:
    """The bases `{path: {"p": ..., "q": ...}}` of the gradients at the weights in `params`.

    The largest entry of every row is positive: kept moments belong to directions, and must not depend on the
    signs that a decomposition, or a machine, happens to give.

    Args:
        loss: `params -> scalar`.
        params: all parameters; those of the targets are arrays.
        targets: whose bases are wanted.
        slots: theirs, with the previous bases.
        basis: how they are found.
        iterations: of a subspace iteration.
        key: of its random rows.
    """
    iterated = [target for target in targets if method_for(target, basis) == "subspace"]
    exact = [target for target in targets if target not in iterated]
    found = _decomposed(loss, params, exact, basis) if exact else {}
    if iterated:
        found |= _iterated(loss, params, iterated, slots, iterations, key)
    new = {target.path: {target.first: found[target.path]} for target in targets}
    both = [target for target in targets if len(target.sides) == 2]
    if both:
        rows = _products(loss, params, {t.path: (t, t.first, found[t.path]) for t in both})
        for target in both:
            other = next(side for side in target.sides if side != target.first)
            new[target.path][other] = bases.orthonormal_rows(rows[target.path])
    return {
        target.path: {
            BASIS[side]: bases.pointed(new[target.path][side]).astype(slots[target.path][BASIS[side]].dtype)
            for side in target.sides
        }
        for target in targets
    }


def with_gradients(
    loss: Loss, targets: Sequence[Projected], gathered: Mapping[str, tuple[Mapping[str, Array], Array]]
) -> Loss:
    """The loss plus a term linear in the weights whose gradient is one that was accumulated before.

    Args:
        loss: `params -> scalar`.
        targets: the projected weights.
        gathered: of some of them their slots, and the known gradient, projected.
    """
    if not gathered:
        return loss

    def both(params: Any) -> Array:
        leaves, total = tree.named_leaves(params), loss(params)
        for target in targets:
            if target.path in gathered:
                a, b = factors_of(target, *gathered[target.path])
                rows = rows_through(a.astype(jnp.float32), leaves[target.path], target.layout)
                total = total + jnp.sum(b * rows)
        return total

    return both


def _decomposed(loss: Loss, params: Any, targets: Sequence[Projected], basis: Method) -> dict[str, Array]:
    """The first basis of each target from its whole gradient."""
    leaves = tree.named_leaves(params)
    weights = {target.path: leaves[target.path] for target in targets}
    gradients = jax.grad(lambda weights: loss(tree.replace(params, weights)))(weights)
    found = {}
    for target in targets:
        decompose = bases.gram_basis if method_for(target, basis) == "gram" else bases.svd_basis
        g = to_canonical(gradients[target.path], target.layout)
        found[target.path] = decompose(g, target.rank, target.first)
    return found


def _iterated(
    loss: Loss, params: Any, targets: Sequence[Projected], slots: Slots, iterations: int, key: Array
) -> dict[str, Array]:
    of = {target.path: target for target in targets}

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

    starts = {target.path: start(target) for target in targets}
    ranks = {target.path: target.rank for target in targets}
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
