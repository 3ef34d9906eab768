"""PSOFT: rotate and scale the principal part of a weight inside its own subspace.

Paper: Wu et al., "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", ICLR 2026.

    W ≈ aᵀ·(s b)     the first r singular directions, a [r, in], b [r, out], frozen; s = alpha / r
    y = x·W + s·(x·aᵀ)·(R - I)ᵀ·b       R = diag(v)·C(Q)·diag(u), C(Q) = (I + Q)(I - Q)⁻¹, Q [r, r] skew

Trained: the entries of Q above the diagonal, and the magnitudes u and v: r·(r - 1)/2 + 2r numbers a weight,
float32; Q = 0, u = v = 1 at first. Backward keeps x·aᵀ, r numbers a token, and not x. The singular values are
in b, or, with split="even", their roots in both. Defaults are those of the usual PyTorch library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import base_matrices, principal
from peftjax.methods.structured._skew import cayley, skew
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class PsoftOptions(DropoutOptions, RankOptions):
    """Those of `psoft`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        alpha: numerator of the scale s, by which b is divided.
        split: where the singular values are: in b ('output'), or half in each factor ('even').
        terms: of the series for C, at least 4; None for the exact rotation.
        scale_in: whether u, the magnitudes before the rotation, are trained.
        scale_out: whether v, those after it, are.
    """

    rank: int = 32
    alpha: float = 32.0
    split: Literal["output", "even"] = "output"
    terms: int | None = None
    scale_in: bool = True
    scale_out: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        one_of(caller, "split", self.split, ("output", "even"))
        if self.rank < 2:
            raise PeftError(f"{caller}: rank must be at least 2, as one direction has no rotation")
        if self.terms is not None and self.terms < 4:
            raise PeftError(f"{caller}: terms must be at least 4, or None for the exact rotation")


@register(
    kind="adapter",
    paper="PSOFT, Wu et al. 2026, ICLR",
    trains="r·(r - 1)/2 + 2r",
    backward_keeps="x·aᵀ",
    conformance=Conformance(example={"rank": 3, "alpha": 3.0}),
)
@takes(PsoftOptions)
def psoft(options: PsoftOptions) -> Transform:
    """Rotate the principal subspace of the targeted weights.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        rank, stack = target.rank, target.stack
        if rank < 2:
            raise PeftError(
                f"psoft: rank 1 of {target.path!r} has no rotation; set a larger rank, or exclude it"
            )
        trained = {"skew": jnp.zeros((*stack, rank * (rank - 1) // 2))}
        if options.scale_in:
            trained["scale_in"] = jnp.ones((*stack, rank))
        if options.scale_out:
            trained["scale_out"] = jnp.ones((*stack, rank))
        svd = principal(base_matrices(target, base), rank)
        sizes = (svd.sizes * (rank / options.alpha))[..., None]
        a, b = svd.u.swapaxes(-1, -2), svd.vt
        root = jnp.sqrt(sizes)
        kept = {"a": a, "b": sizes * b} if options.split == "output" else {"a": root * a, "b": root * b}
        return trained, kept

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        rank = target.rank
        turn = cayley(skew(slots["skew"].astype(jnp.float32), rank), options.terms)
        if "scale_out" in slots:
            turn = slots["scale_out"][..., None] * turn
        if "scale_in" in slots:
            turn = turn * slots["scale_in"][..., None, :]
        change = (turn - jnp.eye(rank)).swapaxes(-1, -2)
        dropout = options.dropout if keys is not None else 0.0
        b = change @ slots["b"]
        return LowRank(base, slots["a"], b, target.layout, options.alpha / rank, dropout, keys)

    return of_weights("psoft", options, start, weight, dropout=options.dropout, one_way=True)
