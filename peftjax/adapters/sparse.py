"""Adapters that change a part of each weight, put into the weights and exchanged there.

A `Patch` holds the new rows or entries of one weight. Putting patches into parameters gives back the
patches that undo it, bit by bit, for they hold what was there:

    params, undo = switch(params, {}, patches(*first))      fused
    params, undo = switch(params, undo, patches(*second))   another one
    params, _    = switch(params, undo, {})                 back to the base

Only the changed rows or entries are written, in place: the cost does not grow with the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.adapters.arithmetic import Adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.indexing import put_entries, put_rows, take_entries, take_rows
from peftjax.weights.layout import Layout
from peftjax.weights.rows import TrainedRows
from peftjax.weights.sparse_entries import SparseEntries


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patch:
    """New rows `[*stack, r, out]`, or new entries `[*stack, K]` where there are columns, of one weight."""

    values: Array
    rows: Array
    columns: Array | None
    layout: Layout = field(metadata={"static": True})

    def of(self, w: Array) -> "Patch":
        """The patch that puts back what `w` has at these places."""
        places = (self.rows,) if self.columns is None else (self.rows, self.columns)
        take = take_rows if self.columns is None else take_entries
        return replace(self, values=take(w, *places, self.layout))

    def put(self, w: Array) -> Array:
        """`w` with these values."""
        if self.columns is None:
            return put_rows(w, self.rows, self.values, self.layout)
        return put_entries(w, self.rows, self.columns, self.values, self.layout)


Patches = Mapping[str, Patch]


def patches(method: Transform, frozen: Frozen, trainable: Trainable, *, weight: float = 1.0) -> Patches:
    """What an adapter of PaCA, SHiRA or SaRA puts in its weights, by path.

    Args:
        method: the adapter's.
        frozen: its frozen part, with the base weights it was made for.
        trainable: the adapter.
        weight: `W + weight · (W' − W)` is put in, instead of W'.

    Raises:
        PeftError: the adapter changes more than rows or entries of arrays.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.shira(density=0.25, targets=["up"])
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> list(pj.adapters.patches(method, frozen, trainable))
        ['up/kernel']
    """
    frozen, trainable = method.open(frozen, trainable)
    bases, found = tree.named_leaves(frozen.params), {}
    for path, leaf in tree.named_leaves(method.apply(replace(frozen, advanced=True), trainable)).items():
        base = bases[path]
        if leaf is base:
            continue
        if not isinstance(leaf, TrainedRows | SparseEntries) or leaf.base is not base:
            raise PeftError(
                f"patches: {path!r} of {method.name} is a {type(leaf).__name__}; only trained rows or "
                "entries of a plain array can be exchanged in it"
            )
        if isinstance(leaf, TrainedRows):
            new = Patch(leaf.scale * leaf.values, leaf.rows, None, leaf.layout)
        else:
            new = Patch(leaf.entries(base), leaf.rows, leaf.columns, leaf.layout)
        if weight != 1.0:
            old = new.of(base).values.astype(jnp.float32)
            new = replace(new, values=old + weight * (new.values - old))
        found[path] = new
    return found


def fuse(params: Params, new: Patches) -> tuple[Params, Patches]:
    """Parameters with the patches put in, and the patches that undo it; `params` stays as it is.

    Raises:
        PeftError: a patch is for a parameter that is not there.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.shira(density=0.25, targets=["up"])
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> fused, undo = pj.adapters.fuse(params, pj.adapters.patches(method, frozen, trainable))
        >>> fused["up"]["kernel"].shape
        (4, 8)
    """
    found, _ = tree.partition(params, new)
    undo = {path: patch.of(found[path]) for path, patch in new.items()}
    return tree.replace(params, {path: patch.put(found[path]) for path, patch in new.items()}), undo


@partial(jax.jit, donate_argnums=0)
def switch(params: Params, undo: Patches, new: Patches) -> tuple[Params, Patches]:
    """Take one adapter out of the parameters and put another in; `params` is donated.

    Args:
        params: fused parameters, or the base.
        undo: of the adapter that is in, `{}` where none is.
        new: the adapter to put in, `{}` for none.

    Returns:
        The parameters, and what undoes it.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
        >>> method = pj.shira(density=0.25, targets=["up"])
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> patches = pj.adapters.patches(method, frozen, trainable)
        >>> fused, undo = pj.adapters.fuse(params, patches)
        >>> base, undo = pj.adapters.switch(fused, undo, {})
        >>> bool((base["up"]["kernel"] == params["up"]["kernel"]).all())
        True
    """
    return fuse(fuse(params, undo)[0], new)


def overlap(first: Adapter, second: Adapter) -> dict[str, tuple[Array, Array]]:
    """How much two adapters of one base interfere, by path of the weights that both change.

    With changes `Δ_1, Δ_2 [in, out]` of a weight, `(AWOM, AWOR)` for each matrix of the stack: the
    largest singular value of `Δ_1 Δ_2ᵀ` (0: orthogonal), and the share of its entries that are zero.
    """
    changes = [_changes(*adapter) for adapter in (first, second)]
    found = {}
    for path in changes[0].keys() & changes[1].keys():
        product = changes[0][path] @ changes[1][path].swapaxes(-1, -2)
        largest = jnp.linalg.svd(product, compute_uv=False)[..., 0]
        found[path] = (largest, jnp.mean(product == 0.0, axis=(-1, -2)))
    return found


def _changes(method: Transform, frozen: Frozen, trainable: Trainable) -> dict[str, Array]:
    frozen, trainable = method.open(frozen, trainable)
    bases = tree.named_leaves(frozen.params)
    adapted: dict[str, Any] = {
        path: leaf
        for path, leaf in tree.named_leaves(method.apply(replace(frozen, advanced=True), trainable)).items()
        if leaf is not bases[path]
    }
    return {
        path: to_canonical(
            dense(leaf).astype(jnp.float32) - dense(bases[path]).astype(jnp.float32), leaf.layout
        )
        for path, leaf in adapted.items()
    }
