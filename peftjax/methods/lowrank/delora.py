"""DeLoRA: a low-rank update of normalized directions, whose size is trained apart and bounded.

Paper: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", ICLR 2025, arXiv 2503.18225.

    y = x·W + λ/r · Σ_i ((x ∘ w)·a_i) b_i / (‖a_i‖ ‖b_i‖)      a [r, in], b [r, out], λ one number
    w [in] = the lengths of the rows of W at the start, frozen; a length below 1e-4 counts as 1e-4

Trained: a, b and λ, r·(in + out) + 1 numbers a weight, float32. Backward keeps LoRA's residuals: all
other numbers go into the factors. Start: a ~ U(±1/√in), b = 0, λ = `bound`. Defaults are those of the usual
PyTorch library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import base_matrices
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank

_LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeloraOptions(DropoutOptions, RankOptions):
    """Those of `delora`.

    Attributes:
        bound: what λ, the bound of the update's size, starts from.
    """

    bound: float = 15.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "bound", self.bound)


@register(
    kind="adapter",
    paper="DeLoRA, Bini et al. 2025, arXiv 2503.18225",
    trains="r·(in + out) + 1",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "bound": 0.5}),
)
@takes(DeloraOptions)
def delora(options: DeloraOptions) -> Transform:
    """Low-rank adaptation whose directions and size are trained apart (arXiv 2503.18225).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        (n, m), shape = target.layout.matrix, (*target.stack, target.rank)
        limit = 1.0 / math.sqrt(n)
        trained = {
            "a": jax.random.uniform(key, (*shape, n), minval=-limit, maxval=limit),
            "b": jnp.zeros((*shape, m)),
            "bound": jnp.full(target.stack, options.bound, jnp.float32),
        }
        return trained, {"norms": jnp.linalg.norm(base_matrices(target, base), axis=-1)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        a, b = slots["a"], slots["b"]
        strength = slots["bound"][..., None] / target.rank / (_lengths(a) * _lengths(b))
        a = a * slots["norms"][..., None, :]
        dropout = options.dropout if keys is not None else 0.0
        return LowRank(base, a, strength[..., None] * b, target.layout, 1.0, dropout, keys)

    return of_weights("delora", options, start, weight, dropout=options.dropout, one_way=True)


def _lengths(factor: Array) -> Array:
    """The lengths of the rows, at least a little."""
    return jnp.sqrt(jnp.maximum(jnp.sum(factor * factor, axis=-1), _LEAST**2))
