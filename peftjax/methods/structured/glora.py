"""GLoRA: scale and shift a weight, and its bias, in a form for each.

Paper: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-Tuning", 2023, arXiv
2306.07967.

    W' = W + W ∘ A + B            A, B [in, out]: `weights`, aᵀb of rank r, a number for each output, or one
    c' = c + c ∘ D + E + C·W      D, E [out]: `biases`, a number for each output, or one
                                  C [in]: `coupling`, u·V of rank r, or a number for each input

c is the bias; where a module has none, there are only A and B. Trained: 2r·(in + out) numbers a weight,
r·(in + 1) + 2 a bias, float32; a is uniform, ±1/√in, u ±1, all else 0 at first. A and B have no thin form:
each layer forms the change. Backward keeps x, the factors and W.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._biased import MaybeBiased, maybe_biased
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added
from peftjax.weights.base import dense
from peftjax.weights.canonical import to_canonical

OfWeights = Literal["lora", "vector", "constant", "none"]
OfBiases = Literal["vector", "constant", "none"]
Coupling = Literal["lora", "vector", "none"]


@dataclass(frozen=True, kw_only=True)
class GloraOptions(RankOptions):
    """Those of `glora`.

    Attributes:
        weights: the form of A and B: 'lora', 'vector', 'constant' or 'none'.
        biases: that of D and E: 'vector', 'constant' or 'none'.
        coupling: that of C: 'lora', 'vector' or 'none'.
    """

    weights: OfWeights = "lora"
    biases: OfBiases = "constant"
    coupling: Coupling = "lora"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "weights", self.weights, get_args(OfWeights))
        one_of(caller, "biases", self.biases, get_args(OfBiases))
        one_of(caller, "coupling", self.coupling, get_args(Coupling))

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its rank."""
        return maybe_biased(super().find(caller, params, one_way=one_way, **ranks), params)

    def shapes_of(self, target: Target) -> dict[str, tuple[int, ...]]:
        """The arrays of one matrix."""
        assert isinstance(target, MaybeBiased)
        (n, m), r = target.layout.matrix, target.rank
        numbers = {"vector": (m,), "constant": (1,)}
        shapes: dict[str, tuple[int, ...]] = {}
        if self.weights == "lora":
            shapes = {"scale_a": (r, n), "scale_b": (r, m), "add_a": (r, n), "add_b": (r, m)}
        elif self.weights != "none":
            shapes = dict.fromkeys(("scale", "add"), numbers[self.weights])
        if target.biased and self.biases != "none":
            shapes |= dict.fromkeys(("gain", "shift"), numbers[self.biases])
        if target.biased and self.coupling == "lora":
            shapes |= {"inner_u": (r,), "inner_v": (r, n)}
        elif target.biased and self.coupling == "vector":
            shapes["inner"] = (n,)
        return shapes


@register(
    kind="adapter",
    paper="GLoRA, Chavan et al. 2023, arXiv 2306.07967",
    trains="2r·(in + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 2, "biases": "none"}),
)
@takes(GloraOptions)
def glora(options: GloraOptions) -> Transform:
    """Scale and shift the targeted weights and their biases (arXiv 2306.07967).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        bounds = {"scale_a": 1.0 / math.sqrt(target.layout.matrix[0]), "inner_u": 1.0}
        bounds["add_a"] = bounds["scale_a"]
        trained = {}
        for slot, shape in options.shapes_of(target).items():
            key, own = jax.random.split(key)
            bound = bounds.get(slot, 0.0)
            trained[slot] = jax.random.uniform(own, (*target.stack, *shape), minval=-bound, maxval=bound)
        return trained, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Any:
        of_weight = {slot: value for slot, value in slots.items() if slot.startswith(("scale", "add"))}
        return Added(base, of_weight, target.layout, _change, True) if of_weight else base

    return of_weights("glora", options, start, weight, bias=_bias, one_way=True)


def _change(slots: Mapping[str, Array], base: Array) -> Array:
    """`W ∘ A + B` of one matrix."""
    if "scale" in slots:
        return base * slots["scale"] + slots["add"]
    return base * (slots["scale_a"].T @ slots["scale_b"]) + slots["add_a"].T @ slots["add_b"]


def _bias(bias: Array, slots: Mapping[str, Array], target: Target, base: Any) -> Array:
    """`c + c ∘ D + E + C·W`."""
    new = bias
    if "gain" in slots:
        new = new + bias * slots["gain"] + slots["shift"]
    inner = slots.get("inner")
    if "inner_u" in slots:
        inner = jnp.einsum("...r,...ri->...i", slots["inner_u"], slots["inner_v"])
    if inner is None:
        return new
    return new + jnp.einsum("...i,...io->...o", inner, to_canonical(dense(base), target.layout))
