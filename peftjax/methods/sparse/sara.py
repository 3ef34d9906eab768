"""SaRA: train the entries of smallest absolute value, under a nuclear-norm penalty.

Paper: Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
Adaptation", ICLR 2025, arXiv 2409.06633.

    M = 1[|W| < θ]      W'[M] = p, W' = W elsewhere, first p = W[M]      dp = (dL/dW')[M] + λ (U Vᵀ)[M]
    with U Σ Vᵀ = W' ∘ M;  at step T:  M ← M ∘ 1[|W'| < θ], the others keep what they learned

Trained: p, K numbers a weight. `frozen.state` holds the current M and the indices of the entries. Backward
keeps each adapted layer's input x; W' and dW exist for one layer at a time where layers are scanned; with
`in_place` the base holds W' and no copy of a weight is made. The penalty's gradient is added where p enters
the model, so that it reaches p in any loop. Defaults: density 0.05 is about the paper's 50 of 860 million;
λ = 5e-4, and T = half of the steps (`reselect_at`), are the released code's. Weight decay pulls p to zero.
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import at_least, one_of, positive, positive_share
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets
from peftjax.methods._entries import Entries, entry_count, largest_entries
from peftjax.methods.sparse._in_place import Place, Plan, Slots, find_weights, in_the_base
from peftjax.methods.sparse._nuclear import Polar, penalized
from peftjax.methods.sparse._reselect import KEEP, LIMIT, hold_dropped, limit_of, reselect
from peftjax.transform.around import Around
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Advance, Transform
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.indexing import NOWHERE, put_entries, take_entries
from peftjax.weights.layout import Layout
from peftjax.weights.sharding import whole
from peftjax.weights.sparse_entries import SparseEntries


@register(
    kind="adapter",
    paper="SaRA, Hu et al. 2025, arXiv 2409.06633",
    trains="K of the entries",
    backward_keeps="the input x",
    of_steps=lambda steps: {"reselect_at": steps // 2},
    conformance=Conformance(example={"density": 0.3}),
)
def sara(
    *,
    density: float | None = None,
    threshold: float | None = None,
    penalty: float = 5e-4,
    polar: Polar = "newton_schulz",
    reselect_at: int | None = None,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    layouts: Mapping[str, str] | None = None,
    in_place: bool = False,
) -> Transform:
    """Training of the smallest entries of the targeted weights (arXiv 2409.06633).

    Args:
        density: the share of each matrix that is trained; 0.05 where there is no threshold either.
        threshold: θ, instead of a density: entries with |W| < θ. Needs the weights' values in `init`, so
            not under `jit`; a weight without such an entry is left alone, and the matrices of a stack
            are filled up to the largest count.
        penalty: λ of the nuclear norm.
        polar: how its gradient is found, 'newton_schulz' or (exactly) 'svd'.
        reselect_at: the step, from 0, before which M is reduced to the entries below θ; None: never.
        targets: as in `lora`.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern.
        in_place: the base may hold the adapted weights; see `Transform.close`.

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or
            a threshold below every entry.
    """
    _check(density, threshold, penalty, polar, reselect_at)
    share = 0.05 if density is None and threshold is None else density
    config = {"density": share}

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        found = find_weights(
            params, caller="sara", targets=targets, exclude=exclude, layouts=layouts, in_place=in_place
        )
        leaves, places, state, trainable = tree.named_leaves(params), [], {}, {}
        for path, layout in found.items():
            w = dense(leaves[path])
            rows, columns = _smallest(path, layout, w, share, threshold)
            if rows.shape[-1] == 0:
                continue
            original = take_entries(w, rows, columns, layout)
            places.append(Place(path, layout, rows.shape[-1]))
            keep, values = rows != NOWHERE, original.astype(jnp.float32) + 0.0
            state[path] = {"rows": rows, "columns": columns, KEEP: keep}
            state[path][LIMIT] = limit_of(values, keep, threshold)
            state[path] |= {"original": original} if in_place else {}
            trainable[path] = {"values": values}
        if not places:
            raise PeftError(f"sara: no entry of the targets is smaller than {threshold}; raise threshold")
        return Frozen(params, state, Plan(tuple(places))), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        leaves, weights = tree.named_leaves(frozen.params), {}
        for place in frozen.plan.places:
            values, held = trainable[place.path]["values"], frozen.state[place.path]
            at = held["rows"], held["columns"]
            if penalty > 0.0:
                values = penalized(penalty, polar, place.layout, values, held[KEEP], *at)
            weights[place.path] = SparseEntries(
                leaves[place.path], values, *at, place.layout, in_place=frozen.plan.closed
            )
        return tree.replace(frozen.params, weights)

    once = Advance(lambda step: step == reselect_at, reselect, changes=(KEEP,))
    return Transform(
        "sara",
        config,
        init,
        apply,
        around=Around(hold_dropped(), hold_dropped()),
        advances=() if reselect_at is None else (once,),
        placement=in_the_base(_put) if in_place else None,
    )


def learning_rate(threshold: float) -> float:
    """The released code's learning rate for a threshold: `1e-3 · exp(-350 θ)`."""
    return 1e-3 * math.exp(-350.0 * threshold)


def _put(w: Array, place: Place, kept: Slots, trained: Slots | None) -> Array:
    values = kept["original"] if trained is None else trained["values"]
    return put_entries(w, kept["rows"], kept["columns"], values, place.layout)


def _check(
    density: float | None, threshold: float | None, penalty: float, polar: str, reselect_at: int | None
) -> None:
    if density is not None and threshold is not None:
        raise PeftError("sara: give a density or a threshold, not both")
    positive_share("sara", "density", density)
    positive("sara", "threshold", threshold)
    at_least("sara", "penalty", penalty, 0)
    one_of("sara", "polar", polar, get_args(Polar))
    at_least("sara", "reselect_at", reselect_at, 0)


def _smallest(path: str, layout: Layout, w: Array, density: float | None, threshold: float | None) -> Entries:
    """The entries of smallest |w|; in a stack filled up with none where a matrix has fewer below."""
    sizes = to_canonical(jnp.abs(whole(w).astype(jnp.float32)), layout)
    if threshold is None:
        return largest_entries(-sizes, layout, entry_count("sara", path, layout, 0, density))
    if isinstance(w, jax.core.Tracer):
        raise PeftError(
            f"sara: how many entries of {path!r} a threshold selects depends on their values; call init "
            "outside jit, or give a density"
        )
    below = sizes < threshold
    count = int(below.sum(axis=(-1, -2)).max())
    rows, columns = largest_entries(-sizes, layout, count)
    flat = below.reshape(*layout.stack, -1)
    inside = jnp.take_along_axis(flat, rows * layout.matrix[1] + columns, axis=-1)
    return jnp.where(inside, rows, NOWHERE), columns
