"""rsLoRA: LoRA with the scale that keeps learning stable as the rank grows.

Paper: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.

    s = alpha / √r   instead of   alpha / r

Everything else, what is trained and what backward keeps, is LoRA's.
"""

from typing import Any

from peftjax.methods.lowrank.lora import STARTS, checked_options, low_rank
from peftjax.transform.transform import MethodInfo, Transform


def rslora(**options: Any) -> Transform:
    """Low-rank adaptation with the scale alpha / sqrt(rank) (arXiv 2312.03732).

    Args:
        **options: those of `lora`, `rslora` excepted.

    Raises:
        PeftError: as `lora`.
    """
    options = checked_options("rslora", options, leave_out=("rslora",))
    return low_rank("rslora", options, STARTS[options["init"]], rslora=True)


METHOD = MethodInfo(
    name="rslora",
    factory=rslora,
    paper="rsLoRA, Kalajdzievski 2023, arXiv 2312.03732",
    trains="r·(in + out)",
    keeps="the input x (shared) and x·aᵀ",
    example={"rank": 2, "alpha": 4.0},
)
