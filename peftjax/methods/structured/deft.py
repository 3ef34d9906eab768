"""DEFT: take directions out of what a weight gives, and put trained ones in their place; PaRa: take only.

Papers: "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", 2025; Chen et al., "PaRa:
Personalizing Text-to-Image Diffusion via Parameter Rank Reduction", ICLR 2025, arXiv 2406.05641.

    y' = y - (y·Tᵀ)·Q + s · (x·Rᵀ)·Q      y = x·W;  P [r, out] and R [r, in] trained
    Q = P, T = max(P, 0)                  `directions="relu"`
    Q = T, P made orthonormal             "qr"
    without R where `removed_only`, PaRa;   s = alpha / r, or 1

Trained: r·(in + out) numbers a weight, float32, or r·out. P is N(0, 0.02²), and R such that y' = y at first,
which no P gives with `removed_only`. Backward keeps x and y, and the r numbers of x·Rᵀ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight, dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.low_rank import LowRank
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class DeftOptions(DropoutOptions, RankOptions):
    """Those of `deft`.

    Attributes:
        alpha: numerator of the scale of what is put in; by default it is not scaled.
        directions: how they follow from P: 'relu' or 'qr'.
        removed_only: whether nothing is put in, as in PaRa.
    """

    alpha: float | None = None
    directions: Literal["relu", "qr"] = "relu"
    removed_only: bool = False

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        one_of(caller, "directions", self.directions, ("relu", "qr"))


@register(
    kind="adapter",
    paper="DEFT, 2025; PaRa, Chen et al. 2025, arXiv 2406.05641",
    trains="r·(in + out)",
    backward_keeps="x (shared) and x·W",
    conformance=Conformance(example={"rank": 2}),
)
@takes(DeftOptions)
def deft(options: DeftOptions) -> Transform:
    """Replace directions of what the targeted weights give by trained ones.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """
    directions = Directions(options.directions)

    def scale_of(target: Target) -> float:
        return 1.0 if options.alpha is None else options.alpha / target.rank

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        p = 0.02 * jax.random.normal(key, (*target.stack, target.rank, target.layout.matrix[1]))
        if options.removed_only:
            return {"p": p}, {}
        w = to_canonical(dense(base), target.layout).astype(jnp.float32)
        w = w if target.layers is None else w[jnp.asarray(target.layers)]
        taken = jnp.einsum("...ro,...io->...ri", directions(p)[1], w)
        return {"p": p, "r": taken / scale_of(target)}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Weight:
        removed = Mapped(base, {"p": slots["p"]}, target.layout, Removal(directions), "after")
        if options.removed_only:
            return removed
        q, scale = directions(slots["p"])[0], scale_of(target)
        return LowRank(removed, slots["r"], q, target.layout, scale, options.dropout, keys)

    return of_weights("deft", options, start, weight, one_way=True, dropout=options.dropout)


@dataclass(frozen=True)
class Directions:
    """The directions that are put in and those that are taken out, `[..., r, out]` each."""

    kind: str

    def __call__(self, p: Array) -> tuple[Array, Array]:
        """Q and T of P; P = 0, as of a layer that is not chosen, has none."""
        p = p.astype(jnp.float32)
        if self.kind == "relu":
            return p, jax.nn.relu(p)
        chosen = jnp.any(p != 0, axis=(-2, -1), keepdims=True)
        q = jnp.linalg.qr(jnp.where(chosen, p, jnp.eye(*p.shape[-2:])).swapaxes(-1, -2))[0].swapaxes(-1, -2)
        q = jnp.where(chosen, q, 0.0)
        return q, q


@dataclass(frozen=True)
class Removal:
    """The map that takes directions out."""

    directions: Directions

    def __call__(self, slots: Mapping[str, Array], y: Array) -> Array:
        """`y - (y·Tᵀ)·Q`."""
        q, t = (side.astype(y.dtype) for side in self.directions(slots["p"]))
        return y - (y @ t.T) @ q
