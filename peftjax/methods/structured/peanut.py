"""PEANuT: an update that a small network makes of the weight itself.

Paper: Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", 2024, arXiv
2410.01870.

    W' = W + s · f(W)·b                                f(W) = h [in, r],  h = σ(W·aᵀ),  a and b [r, out]
    with `depth` d   h_i = σ(h_(i-1)·E_i),  then       E and D [d, r, r], on each row of W
                     h ← σ(h·D_i) + h_(d-i), i = 1 ... d

Trained: 2·r·out + 2·d·r² numbers a weight, float32; a is uniform, ±1/√out, E and D ±1/√r, b = 0 at first.
Each layer forms h and the update. Backward keeps x, W and what is trained.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, one_of, positive
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class PeanutOptions(RankOptions):
    """Those of `peanut`.

    Attributes:
        rank: r, the width of the network.
        depth: d, how many layers it has on its way in, and as many on its way out.
        activation: σ.
        scale: s, of the update.
    """

    rank: int = 32
    depth: int = 0
    activation: Activation = "relu"
    scale: float = 1.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        at_least(caller, "depth", self.depth, 0)
        one_of(caller, "activation", self.activation, get_args(Activation))
        positive(caller, "scale", self.scale)


@register(
    kind="adapter",
    paper="PEANuT, Zhong et al. 2024, arXiv 2410.01870",
    trains="2·r·out",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 2, "depth": 1, "activation": "tanh", "scale": 8.0}),
)
@takes(PeanutOptions)
def peanut(options: PeanutOptions) -> Transform:
    """Add what a small network makes of the targeted weights to them (arXiv 2410.01870).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """
    network = Network(options.depth, options.activation, options.scale)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        outputs, rank = target.layout.matrix[1], target.rank
        shapes = {"a": (rank, outputs)}
        shapes |= {slot: (rank, rank) for number in range(options.depth) for slot in layers_at(number)}
        trained = {"b": jnp.zeros((*target.stack, rank, outputs))}
        for own, (slot, shape) in zip(jax.random.split(key, len(shapes)), shapes.items()):
            bound = 1.0 / math.sqrt(shape[1])
            trained[slot] = jax.random.uniform(own, (*target.stack, *shape), minval=-bound, maxval=bound)
        return trained, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        return Added(base, slots, target.layout, network, True)

    return of_weights("peanut", options, start, weight, one_way=True)


def layers_at(number: int) -> tuple[str, str]:
    """The slots of the layers of that number, on the way in and on the way out."""
    return f"in_{number}", f"out_{number}"


@dataclass(frozen=True)
class Network:
    """The update of one matrix."""

    depth: int
    activation: str
    scale: float

    def __call__(self, slots: Mapping[str, Array], base: Array) -> Array:
        """`s · f(W)·b`."""
        slots = {slot: array.astype(jnp.float32) for slot, array in slots.items()}
        h, passed = self._activated(base @ slots["a"].T), []
        for number in range(self.depth):
            passed.append(h)
            h = self._activated(h @ slots[layers_at(number)[0]])
        for number in range(self.depth):
            h = self._activated(h @ slots[layers_at(number)[1]]) + passed.pop()
        return self.scale * (h @ slots["b"])

    def _activated(self, h: Array) -> Array:
        if self.activation == "gelu":
            return jax.nn.gelu(h, approximate=False)
        return {
            "relu": jax.nn.relu,
            "silu": jax.nn.silu,
            "tanh": jnp.tanh,
            "sigmoid": jax.nn.sigmoid,
        }[self.activation](h)
