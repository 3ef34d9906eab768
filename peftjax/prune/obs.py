"""Entries removed one input at a time, the rest updated to make up for it: SparseGPT.

Paper: Frantar and Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774. For one matrix w `[in, out]` and its
inputs x:

    H = E xᵀx + λ mean(diag H) I        H⁻¹ = UᵀU, U upper triangular
    s_ij = w_ij² / U_ii²                what the output loses without it, the inputs before it being settled
    e_i = (w_i - mask_i w_i) / U_ii,  w -= U_i ⊗ e_i        i = 1 ... in: row i becomes mask_i w_i
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from peftjax.core import tree
from peftjax.core.checks import positive_share
from peftjax.core.errors import PeftError
from peftjax.prune.selection import largest, number_kept
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.layout import layout_of


class Reconstructed(NamedTuple):
    """Weights some of whose entries are gone, and made up for.

    Attributes:
        params: with the weights changed.
        kept: boolean, by path, in the weights' shapes.
    """

    params: Any
    kept: dict[str, Array]


def sparsegpt(
    params: Any,
    moments: Mapping[str, Array],
    *,
    keep: float = 0.5,
    n_of_m: tuple[int, int] | None = None,
    kept: Mapping[str, Array] | None = None,
    damping: float = 0.01,
    block: int = 128,
    layouts: Mapping[str, str] | None = None,
) -> Reconstructed:
    """The weights with the entries gone whose loss the rest makes up for best, and that rest updated.

    Which entries those are is chosen anew for each `block` of inputs, with the weights as the inputs before
    have left them: of all its entries together, so that each block keeps its share, or n of every m inputs
    of each output.

    Args:
        params: the parameters; the weights are arrays.
        moments: `[*stack, in, in]` by path, of `pj.calibrate.input_statistics`.
        keep: the share of the entries that stay.
        n_of_m: n of every m inputs stay instead, such as (2, 4).
        kept: these stay instead, boolean in the weights' shapes.
        damping: λ.
        block: how many inputs are chosen from together.
        layouts: as in `lora`.

    Raises:
        PeftError: a moment is of no parameter, or of a structured weight; an option is out of range.
    """
    positive_share("sparsegpt", "keep", keep)
    leaves = tree.named_leaves(params)
    changed, masks = {}, {}
    for path, moment in moments.items():
        leaf = leaves.get(path)
        if leaf is None or isinstance(leaf, Weight):
            what = (
                "there is no such parameter"
                if leaf is None
                else f"it is a {type(leaf).__name__} and no array"
            )
            raise PeftError(f"sparsegpt: {path!r} cannot be updated: {what}")
        layout = layout_of(path, leaves, layouts)
        if n_of_m is not None and (not 1 <= n_of_m[0] <= n_of_m[1] or layout.matrix[0] % n_of_m[1]):
            raise PeftError(
                f"sparsegpt: n_of_m {n_of_m} does not fit the {layout.matrix[0]} inputs of {path!r}; m "
                "has to divide them, and n to be from 1 to m"
            )
        given = None if kept is None else to_canonical(kept[path], layout)
        matrices = to_canonical(leaf, layout).astype(jnp.float32)
        run = partial(_matrix, keep=keep, n_of_m=n_of_m, damping=damping, block=block)
        for _ in layout.stack:
            run = jax.vmap(run)
        new, mask = jax.jit(run)(matrices, moment) if given is None else jax.jit(run)(matrices, moment, given)
        changed[path] = to_logical(new, layout).astype(leaf.dtype)
        masks[path] = to_logical(mask, layout)
    return Reconstructed(tree.replace(params, changed), masks)


def _matrix(
    w: Float[Array, "n m"],
    moment: Float[Array, "n n"],
    given: Bool[Array, "n m"] | None = None,
    *,
    keep: float,
    n_of_m: tuple[int, int] | None,
    damping: float,
    block: int,
) -> tuple[Float[Array, "n m"], Bool[Array, "n m"]]:
    """One matrix."""
    u = _root_of_inverse(moment, damping)
    size = w.shape[0]
    step = block if n_of_m is None else n_of_m[1]
    starts = range(0, size, step)
    if given is not None:
        starts, step = range(1), size
    kept, done = [], 0
    for start in starts:
        end = min(start + step, size)
        part, own = slice(start, end), jnp.diagonal(u)[start:end, None]
        if given is not None:
            mask = given
        elif n_of_m is not None:
            mask = largest((jnp.square(w[part] / own)).T, n_of_m[0]).T
        else:
            # Rounded up to here, so that the whole keeps its number exactly.
            number = number_kept(keep, end * w.shape[1]) - done
            mask = largest(jnp.square(w[part] / own).reshape(-1), number).reshape(end - start, -1)
            done += number
        w = lax.fori_loop(start, end, partial(_without, u, mask, start), w)
        kept.append(mask)
    whole = jnp.concatenate(kept)
    return jnp.where(whole, w, 0), whole


def _without(
    u: Float[Array, "n n"], mask: Bool[Array, "b m"], start: int, row: Array, w: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    error = jnp.where(mask[row - start], 0, w[row]) / u[row, row]
    return w - u[row][:, None] * error[None]


def _root_of_inverse(moment: Float[Array, "n n"], damping: float) -> Float[Array, "n n"]:
    """U with `UᵀU = H⁻¹`; an input that is always zero gets a 1 there."""
    diagonal = jnp.diagonal(moment)
    h = moment + jnp.diag(jnp.where(diagonal > 0, 0.0, 1.0) + damping * diagonal.mean())
    # Cholesky of H in reversed order is H = R Rᵀ with R upper, so that U is the inverse of R.
    root = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return lax.linalg.triangular_solve(root, jnp.eye(len(h)), left_side=True, lower=False)
