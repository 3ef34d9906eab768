"""LoRA-FA: LoRA with the first factor frozen, so that backward needs no layer input.

Paper: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
Fine-tuning", arXiv 2308.03303.

    y = x·W + s · (x·aᵀ)·b        a frozen, b trained

Trained: r·out numbers a weight. Backward keeps, per adapted layer, only the thin x·aᵀ. `a` is part of
the frozen state: nothing can make it trainable later. A lookup table starts with a ~ N(0, 1) and b = 0, the
other way round than in LoRA, whose a = 0 would stay zero here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.methods.lowrank.factors import is_embedding
from peftjax.methods.lowrank.lora import STARTS, checked_options, low_rank
from peftjax.methods.targets import Target
from peftjax.transform import MethodInfo, Transform


def lora_fa(**options: Any) -> Transform:
    """Low-rank adaptation with frozen `a` (arXiv 2308.03303).

    Args:
        **options: those of `lora`.

    Raises:
        PeftError: as `lora`.
    """
    options = checked_options("lora_fa", options)
    chosen = STARTS[options["init"]]

    def start(key: Array, target: Target, leaf: Any) -> tuple[Array, Array, Any]:
        a, b, leaf = chosen(key, target, leaf)
        if is_embedding(target.path):
            a, b = jax.random.normal(key, a.shape), jnp.zeros_like(b)
        return a, b, leaf

    return low_rank("lora_fa", options, start, train_a=False)


METHOD = MethodInfo(
    name="lora_fa",
    factory=lora_fa,
    paper="LoRA-FA, Zhang et al. 2023, arXiv 2308.03303",
    trains="r·out",
    keeps="x·aᵀ only",
    example={"rank": 2, "alpha": 4.0},
)
