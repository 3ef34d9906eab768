"""HiRA: a low-rank update, multiplied entry by entry with the weight itself.

Paper: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR
2025.

    W' = W + W ∘ (aᵀb)      a [r, in], b [r, out]

Trained: r·(in + out) numbers a weight, float32; a is uniform, ±1/√in, b = 0 at first. The update has the
rank of W, and no thin form: each layer forms it. Backward keeps x, the factors and W.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@dataclass(frozen=True, kw_only=True)
class HiraOptions(DropoutOptions, RankOptions):
    """Those of `hira`.

    Attributes:
        rank: r; at most the smaller side of each weight.
    """

    rank: int = 32


@register(
    kind="adapter",
    paper="HiRA, Huang et al. 2025, ICLR",
    trains="r·(in + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 2}),
)
@takes(HiraOptions)
def hira(options: HiraOptions) -> Transform:
    """Add the product of each targeted weight with a low-rank matrix, entry by entry.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        return Added(base, slots, target.layout, _change, True, options.dropout, keys)

    return of_weights("hira", options, _start, weight, dropout=options.dropout)


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    (n, m), bound = target.layout.matrix, 1.0 / math.sqrt(target.layout.matrix[0])
    a = jax.random.uniform(key, (*target.stack, target.rank, n), minval=-bound, maxval=bound)
    return {"a": a, "b": jnp.zeros((*target.stack, target.rank, m))}, {}


def _change(slots: Mapping[str, Array], base: Array) -> Array:
    return base * (slots["a"].T @ slots["b"])
