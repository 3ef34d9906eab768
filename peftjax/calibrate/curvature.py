"""The curvature of a loss around linear layers, and weights without the directions in which it is small.

K-FAC: of a layer y = x·W, over the rows of a few batches of general text,

    A = mean xᵀx [in, in] = U_A diag(λ) U_Aᵀ      G = mean gᵀg [out, out] = U_G diag(μ) U_Gᵀ, g = dL/dy
    C = U_Aᵀ W U_G      P_ij = λ_i μ_j, the curvature along U_A[:, i] U_G[:, j]ᵀ
    W' = U_A (C ∘ M) U_Gᵀ      M the largest P, as many as have the share `keep` of ΣP

Merullo et al., "From Memorization to Reasoning in the Spectrum of Loss Curvature", 2025, arXiv 2510.24256:
what a model recites lies in directions that matter to few samples, and so have little curvature on average.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.calibrate._observing import observed_sums
from peftjax.core import tree
from peftjax.core.checks import positive_share
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets
from peftjax.interpreter import adapt
from peftjax.weights.base import Weight
from peftjax.weights.canonical import to_canonical, to_logical
from peftjax.weights.layout import Layout, layout_of
from peftjax.weights.observed import Observed, observed, with_observed_gradients

Loss = Callable[[Any, Any], Array]
"""`(params, batch) -> loss`, a scalar."""


@dataclass(frozen=True)
class CurvatureFactors:
    """Of each weight by path, float32.

    Attributes:
        inputs: A, `[*stack, in, in]`.
        outputs: G, `[*stack, out, out]`; of a mean over N rows, N² times smaller than of their sum.
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]


class Edited(NamedTuple):
    """Parameters without the directions of little curvature.

    Attributes:
        params: the parameters.
        kept: the share of the directions of each matrix that were kept, `[*stack]` by path.
    """

    params: Any
    kept: dict[str, np.ndarray]


def curvature_factors(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    mask: Callable[[Any], Array] | None = None,
) -> CurvatureFactors:
    """A and G of the targeted weights: second moments of what enters them, and of the gradients behind them.

    Each batch takes the time of a forward and a backward pass without the gradients of weights, and the
    memory of both matrices of all targets: take few layers of a large model at a time.

    Args:
        loss: of the parameters and a batch; of next tokens, where the model is a language model.
        params: the parameters, plain or structured.
        batches: a calibration set of general data, of one size each.
        targets: as in `lora`; linear layers alone.
        exclude: what to leave out, in the same forms; wins over `targets`.
        mask: which rows of a batch count, as of `input_statistics`.

    Raises:
        PeftError: as of `input_statistics`.
    """

    def observe(leaf: Any, layout: Layout, mask: Array | None) -> dict[str, Observed]:
        inputs = observed(leaf, layout, mask)
        return {"inputs": inputs, "outputs": with_observed_gradients(inputs, layout, mask)}

    where = {"targets": targets, "exclude": exclude, "mask": mask}
    total = observed_sums("curvature_factors", adapt(loss), params, batches, observe, **where)
    found = CurvatureFactors({}, {})
    for path, sums in total.items():
        counts = sums["inputs"]["count"]
        if not bool((counts > 0).all()):
            raise PeftError(f"curvature_factors: no row of {path!r} reaches the loss; exclude it")
        for side, moments in (("inputs", found.inputs), ("outputs", found.outputs)):
            moments[path] = sums[side]["moment"] / counts[..., None, None]
    return found


def keep_curvature(params: Any, factors: CurvatureFactors, *, keep: float = 0.8) -> Edited:
    """The weights with the directions of most curvature alone.

    Args:
        params: the parameters; those with factors are arrays.
        factors: of `curvature_factors`, for the weights to change.
        keep: the share of each matrix's curvature that is kept; 1 leaves it as it is.

    Raises:
        PeftError: for a share out of range, and for a weight that is no array or that the factors do not fit.
    """
    positive_share("keep_curvature", "keep", keep)
    leaves, changed, kept = tree.named_leaves(params), {}, {}
    for path, inputs in factors.inputs.items():
        leaf, outputs = leaves.get(path), factors.outputs[path]
        if isinstance(leaf, Weight) or not tree.is_array(leaf):
            raise PeftError(f"keep_curvature: {path!r} is no array here; give the parameters of the factors")
        layout = layout_of(path, leaves, None, one_way=True)
        if (*layout.stack, *layout.matrix) != (*inputs.shape[:-1], outputs.shape[-1]):
            n, m = layout.matrix
            raise PeftError(
                f"keep_curvature: the factors of {path!r} are of {inputs.shape[-1]} inputs and "
                f"{outputs.shape[-1]} outputs, the weight is a matrix of {n} x {m}; give the model's own"
            )
        w = to_canonical(leaf, layout).astype(jnp.float32)
        (rows, u), (columns, v) = (jnp.linalg.eigh(moment) for moment in (inputs, outputs))
        held = _largest(np.asarray(rows, np.float64), np.asarray(columns, np.float64), keep)
        turned = jnp.einsum("...ia,...io,...ob->...ab", u, w, v, precision="highest")
        new = jnp.einsum("...ia,...ab,...ob->...io", u, jnp.where(held, turned, 0.0), v, precision="highest")
        kept[path] = held.mean(axis=(-1, -2))
        # What is kept whole stays as it is, to the last bit.
        new = jnp.where(jnp.asarray(held.all(axis=(-1, -2), keepdims=True)), w, new)
        changed[path] = to_logical(new, layout).astype(leaf.dtype)
    return Edited(tree.replace(params, changed), kept)


def _largest(rows: np.ndarray, columns: np.ndarray, keep: float) -> np.ndarray:
    """The fewest products of both, the largest, whose sum has that share of all, bool `[*stack, i, o]`."""
    products = np.maximum(rows, 0.0)[..., :, None] * np.maximum(columns, 0.0)[..., None, :]
    held = np.ones(products.shape, bool)
    if keep == 1.0:
        return held
    for at in np.ndindex(products.shape[:-2]):
        flat = products[at].reshape(-1)
        order = np.argsort(-flat, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(flat[order])[:-1]])
        own = np.zeros(flat.size, bool)
        own[order[before < keep * flat.sum()]] = True
        held[at] = own.reshape(products[at].shape)
    return held
