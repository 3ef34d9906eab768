"""LoHa: an update that is the product, entry by entry, of two low-rank ones.

Papers: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
ICLR 2022, arXiv 2108.06098; as an adapter, Yeh et al., "Navigating Text-To-Image Customization", ICLR 2024,
arXiv 2309.14859.

    W' = W + s · (a₁ᵀb₁) ∘ (a₂ᵀb₂)      a [r, in], b [r, out]      s = alpha / r

Trained: 2r·(in + out) numbers a weight, float32, for an update of rank up to r². At first a₂ = 0, and the
others are uniform, a₁ ±1/√in and b ±1/√r. The update has no thin form: each layer forms it. Backward keeps x
and the factors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._options import ScaledOptions
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@register(
    kind="adapter",
    paper="LoHa (FedPara), Hyeon-Woo et al. 2022, arXiv 2108.06098",
    trains="2r·(in + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(ScaledOptions)
def loha(options: ScaledOptions) -> Transform:
    """Add the Hadamard product of two low-rank matrices to the targeted weights (arXiv 2108.06098).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        return Added(base, slots, target.layout, Hadamard(options.scale_of(target)))

    return of_weights("loha", options, _start, weight)


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    (n, m), rank, stack = target.layout.matrix, target.rank, target.stack
    shapes = {"a1": (rank, n), "b1": (rank, m), "b2": (rank, m)}
    fans = {"a1": n, "b1": rank, "b2": rank}
    trained = {"a2": jnp.zeros((*stack, rank, n))}
    for own, (name, shape) in zip(jax.random.split(key, 3), shapes.items()):
        bound = 1.0 / math.sqrt(fans[name])
        trained[name] = jax.random.uniform(own, (*stack, *shape), minval=-bound, maxval=bound)
    return trained, {}


@dataclass(frozen=True)
class Hadamard:
    """The update of one matrix."""

    scale: float

    def __call__(self, slots: Mapping[str, Array]) -> Array:
        """`scale · (a₁ᵀb₁) ∘ (a₂ᵀb₂)`."""
        return self.scale * (slots["a1"].T @ slots["b1"]) * (slots["a2"].T @ slots["b2"])
