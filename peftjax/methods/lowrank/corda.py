"""CorDA: LoRA on the part of each weight that the inputs of some data make the most, or the least, of.

Paper: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv 2406.05223.

    C = mean of xᵀx [in, in] + damping · (mean of its diagonal) · I      C·W = U Σ Vᵀ      W = C⁻¹ U Σ Vᵀ
    a₀ = √(Σ_r / s) (C⁻¹U_r)ᵀ      b₀ = √(Σ_r / s) V_rᵀ      y = x·W + s · ((x·aᵀ)·b - (x·a₀ᵀ)·b₀)

The r parts are the first ones with `keep=False`, trained for a task like the data's (the paper's
instruction-previewed mode), the last ones with `keep=True`, so that what the data need stays (its
knowledge-preserved mode). Trained: a and b, r·(in + out) numbers a weight. The first factors are kept beside
them, so that W stays as it is. Backward keeps what LoRA's does. `moments` come from
`peftjax.calibrate.input_statistics`. Default damping = 0.01, that of the released code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.core.linalg import Svd, balanced, svd_of
from peftjax.methods.lowrank._factors import ScaledTarget
from peftjax.methods.lowrank._from_data import (
    FromDataOptions,
    from_factors,
    matrices_of,
    require_data,
    statistics_of,
)
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class CordaOptions(FromDataOptions, ScaleOptions):
    """Those of `lora` but `init`, and more.

    Attributes:
        moments: second moments `[*stack, in, in]` of the inputs, by path.
        keep: train the last parts, not the first, so that what the data need is kept.
        damping: on the diagonal, as a share of its mean.
    """

    moments: Mapping[str, jax.Array] | None = None
    keep: bool = False
    damping: float = 0.01

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "damping", self.damping)
        require_data(caller, self.loaded, "moments", self.moments, "peftjax.calibrate.input_statistics")


@register(
    kind="adapter",
    paper="CorDA, Yang et al. 2024, arXiv 2406.05223",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "loaded": True}),
)
@takes(CordaOptions)
def corda(options: CordaOptions) -> Transform:
    """Low-rank adaptation that starts from a weight and its inputs (arXiv 2406.05223).

    A saved method has `loaded=True`, and the start from its file.

    Raises:
        PeftError: as `lora`; here without moments; in `init` for moments that do not fit the parameters.
    """
    moments = options.moments or {}

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array]:
        moment = statistics_of("corda", "moments", moments, target, side="i")
        size = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / moment.shape[-1]
        moment += options.damping * size * jnp.eye(moment.shape[-1])
        svd = svd_of(moment @ matrices_of(target, leaf))
        r, count = target.rank, svd.sizes.shape[-1]
        parts = slice(count - r, count) if options.keep else slice(0, r)
        u = jnp.linalg.solve(moment, svd.u[..., parts])
        return balanced(Svd(u, svd.sizes[..., parts] / target.scale, svd.vt[..., parts, :]))

    return from_factors("corda", options, start, rslora=options.rslora)
