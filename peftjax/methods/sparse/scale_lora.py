"""ScaleLoRA: each entry of a pruned weight times one of a low-rank matrix that starts as all ones.

Paper: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, arXiv
2312.15230.

    W' = W ∘ ((1/√r + a)ᵀ(1/√r + b))        a [r, in], b [r, out]

Trained: r·(in + out) numbers a weight, float32, 0 at first: a and b are what the factors differ from their
start by, so that weight decay pulls W' to W. Zeros stay zero, also merged. The product has no thin form:
each layer forms it. Backward keeps x and the factors, and forms it again. Default: r = 16, as released.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@dataclass(frozen=True, kw_only=True)
class ScaleLoraOptions(RankOptions):
    """Those of `scale_lora`.

    Attributes:
        rank: r; at most the smaller side of each weight.
    """

    rank: int = 16


@register(
    kind="adapter",
    paper="PERP's ScaleLoRA, Zimmer et al. 2023, arXiv 2312.15230",
    trains="r·(in + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 2}),
)
@takes(ScaleLoraOptions)
def scale_lora(options: ScaleLoraOptions) -> Transform:
    """Scale each entry of the targeted weights by a low-rank matrix (arXiv 2312.15230).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        return Added(base, slots, target.layout, scaled, True)

    return of_weights("scale_lora", options, _start, weight)


def scaled(slots: Mapping[str, Array], base: Array) -> Array:
    """What the scaled matrix differs from the base by: `base ∘ (a'ᵀb' - 1)` with `a' = 1/√r + a`."""
    start = 1.0 / math.sqrt(slots["a"].shape[0])
    # Σ_r (1/√r + a)(1/√r + b) - 1, in which no 1 has to cancel.
    sums = jnp.sum(slots["a"], 0)[:, None] + jnp.sum(slots["b"], 0)
    return base * (start * sums + slots["a"].T @ slots["b"])


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    n, m = target.layout.matrix
    shape = (*target.stack, target.rank)
    return {"a": jnp.zeros((*shape, n)), "b": jnp.zeros((*shape, m))}, {}
