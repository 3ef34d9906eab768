"""DoRA: train the direction of each weight's columns by LoRA and their lengths apart.

Paper: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353.

    V = W + s·aᵀb          c_j = ‖V_j‖ over all inputs of output j, held constant in backward
    y = (m / c) ∘ (x·W + s·(x·aᵀ)·b)        m [out] trained, m = ‖W_j‖ at the start

Trained: a, b and m, r·(in + out) + out numbers a weight. Backward keeps LoRA's residuals and the output
before its scaling; V is never formed: c comes from `‖W_j‖² + 2s b_j·(aW)_j + s² b_jᵀ(aaᵀ)b_j`.

The released PyTorch version forms aᵀb for the lengths, and with dropout runs the base layer a second
time on the dropped input; here dropout acts on the adapter's path alone, as in LoRA.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.methods._targets import Target
from peftjax.methods.lowrank._factors import start_uniform
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.column_normalized import ColumnNormalized, column_squares
from peftjax.weights.low_rank import LowRank


@register(
    kind="adapter",
    paper="DoRA, Liu et al. 2024, arXiv 2402.09353",
    trains="r·(in + out) + out",
    backward_keeps="x (shared), x·aᵀ and the output before scaling",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(ScaleOptions)
def dora(options: ScaleOptions) -> Transform:
    """Weight-decomposed low-rank adaptation (arXiv 2402.09353).

    Raises:
        PeftError: as `lora`.
    """
    wrap = Wrap(_apply, _init)
    return low_rank("dora", options, start_uniform, rslora=options.rslora, wrap=wrap, one_way=True)


def _init(key: Array, target: Target, base: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    squares = column_squares(base, target.layout)
    chosen = squares if target.layers is None else squares[jnp.asarray(target.layers)]
    return {"magnitude": jnp.sqrt(chosen)}, {"squares": squares}


def _apply(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> ColumnNormalized:
    magnitude, squares = slots["magnitude"], slots["squares"]
    if target.layers is not None:
        magnitude = jnp.sqrt(squares).at[jnp.asarray(target.layers)].set(magnitude)
    return ColumnNormalized(weight, magnitude, squares, weight.layout)
