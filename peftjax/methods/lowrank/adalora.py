"""AdaLoRA: low-rank updates in the form of an SVD, whose directions all weights compete for.

Paper: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023,
arXiv 2303.10512.

    y = x·W + s · ((x·aᵀ) ∘ e)·b       a [r, in], e [r], b [r, out], s = alpha / (r + 1e-5)
    loss + orthogonality · mean(‖aaᵀ - I‖, ‖bbᵀ - I‖)      over all factors of all weights

Trained: a, e and b, r·(in + out + 1) numbers a weight, float32; two averages of that size lie beside the
optimizer's state. From `rank` on, directions are cut, e = 0, until `target_rank` are left on average
(`_ranks.py`). Shapes stay; `frozen.state` says which are kept. Backward keeps LoRA's residuals. Start: e = 0,
a and b ~ N(0, 0.02²). Defaults are those of the usual PyTorch library, but for alpha and final_warmup.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.checks import at_least, fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods._importance import track_importance
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._orthogonality import penalize
from peftjax.methods.lowrank._ranks import GATE, KEPT, Schedule, share_out
from peftjax.transform.around import Around
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class AdaloraOptions(DropoutOptions, RankOptions):
    """Those of `adalora`.

    Attributes:
        total_steps: optimizer steps of the training.
        rank: r at first.
        target_rank: r in the end, on average over the weights.
        alpha: numerator of the scale.
        init_warmup: steps before the first cut.
        final_warmup: steps after the last one.
        allocate_every: steps between two cuts.
        beta1: decay of the average importance.
        beta2: decay of its average deviation.
        orthogonality: weight of the penalty on factors that are not orthonormal.
    """

    total_steps: int
    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    init_warmup: int = 0
    final_warmup: int = 1
    allocate_every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range, but for those of the schedule."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        fraction(caller, "beta1", self.beta1)
        fraction(caller, "beta2", self.beta2)
        at_least(caller, "orthogonality", self.orthogonality, 0)
        if self.target_rank > self.rank:
            raise PeftError(f"{caller}: target_rank {self.target_rank} is larger than rank {self.rank}")

    @property
    def schedule(self) -> Schedule:
        """When directions are cut."""
        return Schedule(
            target_rank=self.target_rank,
            total_steps=self.total_steps,
            init_warmup=self.init_warmup,
            final_warmup=self.final_warmup,
            every=self.allocate_every,
        )


@register(
    kind="adapter",
    paper="AdaLoRA, Zhang et al. 2023, arXiv 2303.10512",
    trains="r·(in + out + 1)",
    backward_keeps="the input x (shared) and x·aᵀ",
    of_steps=lambda steps: {"total_steps": steps},
    conformance=Conformance(example={"rank": 3, "target_rank": 2, "alpha": 6.0, "total_steps": 20}),
)
@takes(AdaloraOptions)
def adalora(options: AdaloraOptions) -> Transform:
    """Low-rank adaptation with a budget of directions (arXiv 2303.10512).

    Importance and penalty are part of `Transform.optimizer`; the loss that a step reports has no penalty.

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """
    schedule = options.schedule
    importance = track_importance("adalora", options.beta1, options.beta2, ("a", "e", "b"))
    tracked = optax.conditionally_transform(importance, schedule.measured, forward_extra_args=True)

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        e = slots["e"] * slots[GATE]
        dropout = options.dropout if keys is not None else 0.0
        scale = options.alpha / (target.rank + 1e-5)
        return LowRank(base, slots["a"], e[..., None] * slots["b"], target.layout, scale, dropout, keys)

    return of_weights(
        "adalora",
        options,
        _start,
        weight,
        dropout=options.dropout,
        around=Around(gradients=penalize("adalora", options.orthogonality), updates=tracked),
        advances=(share_out(schedule),),
    )


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    (n, m), shape = target.layout.matrix, (*target.stack, target.rank)
    keys = jax.random.split(key)
    trained = {
        "a": 0.02 * jax.random.normal(keys[0], (*shape, n)),
        "e": jnp.zeros(shape),
        "b": 0.02 * jax.random.normal(keys[1], (*shape, m)),
    }
    return trained, {KEPT: jnp.ones(shape, bool), GATE: jnp.ones(shape, bool)}
