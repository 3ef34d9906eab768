"""LaMDA: a small core trained between two frozen projections, the second of which is trained for a while.

Paper: Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
Findings of EMNLP 2024, arXiv 2406.12832.

    y = x·W + alpha/r · (x·aᵀ)·(S·b)        a [r, in], b [r, out] the first singular directions of W, S [r, r]
    row i of b is trained for the first η·T·(i + 1)/r steps of T, so that the first directions stop first

Trained: S, r² numbers a weight, zero at first, and r·out for b, float32; with η = 0 b is frozen from the
start and costs no optimizer state. Backward keeps x·aᵀ, r numbers a token, and not x. The defaults of η, r
and alpha are the released scripts'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.checks import fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import base_matrices, principal
from peftjax.transform.around import Around, Own
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class LamdaOptions(DropoutOptions, RankOptions):
    """Those of `lamda`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        alpha: numerator of the scale.
        unfrozen: η, the share of the training for which rows of b are trained.
        total_steps: T, optimizer steps of the training; not needed where η is 0.
    """

    rank: int = 64
    alpha: float = 16.0
    unfrozen: float = 0.3
    total_steps: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        fraction(caller, "unfrozen", self.unfrozen)
        positive(caller, "total_steps", self.total_steps)
        if self.unfrozen > 0.0 and self.total_steps is None:
            raise PeftError(
                f"{caller}: give total_steps, of which b is trained for {self.unfrozen}, or unfrozen=0"
            )


@register(
    kind="adapter",
    paper="LaMDA, Azizi et al. 2024, arXiv 2406.12832",
    trains="r² + r·out for a while",
    backward_keeps="x·aᵀ",
    of_steps=lambda steps: {"total_steps": steps},
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "total_steps": 50}),
)
@takes(LamdaOptions)
def lamda(options: LamdaOptions) -> Transform:
    """Train a core between the first singular directions of the targeted weights (arXiv 2406.12832).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """
    steps = options.unfrozen * (options.total_steps or 0)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        svd = principal(base_matrices(target, base), target.rank)
        trained, kept = {"core": jnp.zeros((*target.stack, target.rank, target.rank))}, {}
        (trained if steps > 0.0 else kept)["b"] = svd.vt
        return trained, {**kept, "a": svd.u.swapaxes(-1, -2)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        b, dropout = slots["core"] @ slots["b"], options.dropout if keys is not None else 0.0
        return LowRank(base, slots["a"], b, target.layout, options.alpha / target.rank, dropout, keys)

    around = Around(freeze_in_turn(steps), freeze_in_turn(steps)) if steps > 0.0 else None
    return of_weights("lamda", options, start, weight, dropout=options.dropout, around=around)


def freeze_in_turn(steps: float) -> optax.GradientTransformationExtraArgs:
    """Zero what belongs to row i of each b after `steps · (i + 1) / r` updates."""

    def update(updates: Own, count: Array, params: Own | None = None, **extra: Any) -> tuple[Own, Array]:
        def left(b: Array) -> Array:
            rank = b.shape[-2]
            going_on = count < steps * (jnp.arange(rank) + 1) / rank
            return jnp.where(going_on[:, None], b, jnp.zeros_like(b))

        new = {
            path: {
                name: left(value) if name == "b" and not isinstance(value, optax.MaskedNode) else value
                for name, value in slots.items()
            }
            for path, slots in updates.items()
        }
        return new, optax.safe_increment(count)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)
