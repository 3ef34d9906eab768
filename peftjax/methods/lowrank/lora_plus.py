"""LoRA+: LoRA with a larger learning rate for the second factor.

Paper: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv 2402.12354.

    Δa = −η · update,      Δb = −ratio · η · update

A rewrite of the optimizer: every update of a `b`, weight decay included, is multiplied by the ratio,
which for optax optimizers is the same as a learning rate of its own. Everything else is LoRA's. The
ratio 16 is the one the authors recommend.
"""

from typing import Any

import jax

from peftjax.core.errors import PeftError
from peftjax.methods.lowrank.lora import STARTS, checked_options, low_rank
from peftjax.transform.around import Around, on_slots
from peftjax.transform.transform import MethodInfo, Transform


def lora_plus(*, ratio: float = 16.0, **options: Any) -> Transform:
    """Low-rank adaptation with `ratio` times the learning rate on `b` (arXiv 2402.12354).

    Args:
        ratio: λ = η_b / η_a.
        **options: those of `lora`.

    Raises:
        PeftError: as `lora`, or when the ratio is not positive.
    """
    options = checked_options("lora_plus", options)
    if ratio <= 0:
        raise PeftError(f"lora_plus: ratio must be positive, got {ratio}")

    faster_b = on_slots(
        lambda slot, update: jax.tree.map(lambda u: ratio * u, update) if slot == "b" else update
    )
    start = STARTS[options["init"]]
    return low_rank("lora_plus", {**options, "ratio": ratio}, start, around=Around(updates=faster_b))


METHOD = MethodInfo(
    name="lora_plus",
    factory=lora_plus,
    paper="LoRA+, Hayou et al. 2024, arXiv 2402.12354",
    trains="r·(in + out)",
    keeps="the input x (shared) and x·aᵀ",
    example={"rank": 2, "alpha": 4.0},
)
