"""MaskLoRA: a low-rank update of a pruned weight that leaves the pruned entries zero, also merged.

Paper: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, arXiv
2312.15230.

    W' = W + s · M ∘ (aᵀb),   M = 1[W ≠ 0],   s = alpha / r        a [r, in], b [r, out]

Trained: r·(in + out) numbers a weight, float32; a is uniform, ±1/√in, b = 0 at first. M is read off the
base where it is needed, and not stored. The update has no thin form: each layer forms it. Backward keeps x
and the factors, and forms it again. Biases, norms and heads are trained by other methods beside it, as in
`pj.chain(pj.mask_lora(), pj.bitfit())`. Defaults: r = 16 and alpha = 32, as released.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@dataclass(frozen=True, kw_only=True)
class MaskLoraOptions(RankOptions):
    """Those of `mask_lora`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        alpha: numerator of the scale; by default 2·r.
    """

    rank: int = 16
    alpha: float | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)


@register(
    kind="adapter",
    paper="PERP's MaskLoRA, Zimmer et al. 2023, arXiv 2312.15230",
    trains="r·(in + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 2}),
)
@takes(MaskLoraOptions)
def mask_lora(options: MaskLoraOptions) -> Transform:
    """Low-rank updates of pruned weights that keep their zeros (arXiv 2312.15230).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        scale = 2.0 if options.alpha is None else options.alpha / target.rank
        return Added(base, slots, target.layout, MaskedProduct(scale), True)

    return of_weights("mask_lora", options, _start, weight)


@dataclass(frozen=True)
class MaskedProduct:
    """`(slots, base) -> scale · aᵀb` where the base is not zero."""

    scale: float

    def __call__(self, slots: Mapping[str, Array], base: Array) -> Array:
        """The change of one matrix."""
        return jnp.where(base == 0, 0.0, self.scale * (slots["a"].T @ slots["b"]))


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    (n, m), bound = target.layout.matrix, 1.0 / math.sqrt(target.layout.matrix[0])
    a = jax.random.uniform(key, (*target.stack, target.rank, n), minval=-bound, maxval=bound)
    return {"a": a, "b": jnp.zeros((*target.stack, target.rank, m))}, {}
