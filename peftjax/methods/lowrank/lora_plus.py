"""LoRA+: LoRA with a larger learning rate for the second factor.

Paper: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv 2402.12354.

    Δa = −η · update,      Δb = −ratio · η · update

A rewrite of the optimizer: every update of a `b`, weight decay included, is multiplied by the ratio,
which for optax optimizers is the same as a learning rate of its own. Everything else is LoRA's. The
ratio 16 is the one the authors recommend.
"""

from dataclasses import dataclass

import jax

from peftjax.core.checks import positive
from peftjax.methods.lowrank._options import LoraOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.around import Around, on_slots
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class LoraPlusOptions(LoraOptions):
    """Those of `lora`, and one more.

    Attributes:
        ratio: λ = η_b / η_a.
    """

    ratio: float = 16.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "ratio", self.ratio)


@register(
    kind="adapter",
    paper="LoRA+, Hayou et al. 2024, arXiv 2402.12354",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(LoraPlusOptions)
def lora_plus(options: LoraPlusOptions) -> Transform:
    """Low-rank adaptation with `ratio` times the learning rate on `b` (arXiv 2402.12354).

    Raises:
        PeftError: as `lora`, or when the ratio is not positive.
    """
    faster_b = on_slots(
        lambda slot, update: jax.tree.map(lambda u: options.ratio * u, update) if slot == "b" else update
    )
    around = Around(updates=faster_b)
    return low_rank("lora_plus", options, options.start, rslora=options.rslora, around=around)
