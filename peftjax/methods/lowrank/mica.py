"""MiCA: LoRA on the minor singular directions of each weight, of which one factor is trained.

Paper: "Minor Component Adaptation", 2026, arXiv 2604.01694.

    W = U Σ Vᵀ      W' = W + s·aᵀb      b = the r vectors of V with the smallest singular values, frozen
                                        a [r, in] = 0 at first, trained;  s = alpha / r

Trained: r·in numbers a weight, float32. Backward keeps the input x, and no `x·aᵀ`. The start needs a plain
floating-point base.
"""

from typing import Any

from jax import Array

from peftjax.core.linalg import svd_of
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, zeros
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@register(
    kind="adapter",
    paper="MiCA, 2026, arXiv 2604.01694",
    trains="r·in",
    backward_keeps="the input x (shared)",
    quantized_base=False,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(ScaleOptions)
def mica(options: ScaleOptions) -> Transform:
    """Low-rank adaptation into the directions that a weight uses least (arXiv 2604.01694).

    Raises:
        PeftError: as `lora`; in `init`, when a base is not a plain array.
    """
    return low_rank("mica", options, _start, rslora=options.rslora, trained=("a",), one_way=True)


def _start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Any]:
    a, _ = zeros(target)
    return a, svd_of(plain_matrices("mica", target, leaf)).vt[..., -target.rank :, :], leaf
