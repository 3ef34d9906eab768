"""VeLoRA: LoRA whose backward pass keeps a few numbers of each input, and not the input.

Paper: Miles et al., "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", NeurIPS 2024,
arXiv 2405.17991.

    forward   y = x·W + s · (x·aᵀ)·b              x cut into G groups x_g of its features, v of length one
    kept      c_g = x_g · v                       x̂_g = k · c_g v        ∂L/∂a from x̂, ∂L/∂x exact

Trained: a and b, r·(in + out) numbers a weight. Backward keeps the G numbers c and x·aᵀ of each token, and
not x. v is the mean of all x_g of the batch at hand, or drawn once and fixed. Start, scale and merged weight
are LoRA's; so are layers that are no linear ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.methods._targets import Target, all_layers
from peftjax.methods.lowrank._options import LoraOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.compressed import Compressed
from peftjax.weights.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class VeloraOptions(LoraOptions):
    """Those of `lora`, and three more.

    Attributes:
        groups: G, how many numbers of an input are kept.
        strength: k, the factor of what stands for the input.
        direction: whether v is the mean of the batch at hand, or one that is drawn in `init`.
    """

    groups: int = 64
    strength: float = 1.0
    direction: Literal["batch", "fixed"] = "batch"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "groups", self.groups)
        positive(caller, "strength", self.strength)
        one_of(caller, "direction", self.direction, ("batch", "fixed"))


@register(
    kind="adapter",
    paper="VeLoRA, Miles et al. 2024, arXiv 2405.17991",
    trains="r·(in + out)",
    backward_keeps="G numbers of x, and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "groups": 4}),
)
@takes(VeloraOptions)
def velora(options: VeloraOptions) -> Transform:
    """Low-rank adaptation that keeps a projection of its inputs (arXiv 2405.17991).

    Raises:
        PeftError: as `lora`.
    """
    fixed = options.direction == "fixed"

    def directions(key: Array, target: Target, base: object) -> tuple[dict[str, Array], dict[str, Array]]:
        width = -(-target.layout.matrix[0] // options.groups)
        v = jax.random.normal(key, (*target.stack, width))
        return {}, {"v": v / jnp.linalg.norm(v, axis=-1, keepdims=True)} if fixed else {}

    def compressed(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> Compressed:
        parts = {field.name: getattr(weight, field.name) for field in fields(LowRank)}
        v = all_layers(slots["v"], target) if fixed else None
        return Compressed(**parts, direction=v, groups=options.groups, strength=options.strength)

    wrap = Wrap(compressed, directions)
    return low_rank("velora", options, options.start, rslora=options.rslora, wrap=wrap, one_way=True)
