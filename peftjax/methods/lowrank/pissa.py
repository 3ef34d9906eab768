"""PiSSA: LoRA that starts from, and trains, the principal part of each weight.

Paper: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS 2024,
arXiv 2404.02948.

    W = U Σ Vᵀ      a = (√(Σ_r / s)·U_rᵀ)      b = (√(Σ_r / s)·V_rᵀ)      base = W − s·aᵀb

Trained and kept by backward: as LoRA. The base given to `init` is not changed: the residual is a new
array in the frozen parameters. The start needs a plain floating-point base.
"""

from dataclasses import dataclass
from typing import Any

from jax import Array

from peftjax.core.checks import positive
from peftjax.core.linalg import balanced, randomized_svd, svd_of
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, residual
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class PissaOptions(ScaleOptions):
    """Those of `lora` but `init`, and one more; the paper uses dropout 0.

    Attributes:
        iterations: power iterations of a randomized SVD; None takes the exact SVD.
    """

    iterations: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "iterations", self.iterations)


@register(
    kind="adapter",
    paper="PiSSA, Meng et al. 2024, arXiv 2404.02948",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(PissaOptions)
def pissa(options: PissaOptions) -> Transform:
    """Low-rank adaptation of the principal singular part (arXiv 2404.02948).

    Raises:
        PeftError: as `lora`; in `init`, when a base is not a plain array.
    """
    iterations = options.iterations

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Array]:
        w = plain_matrices("pissa", target, leaf)
        svd = svd_of(w) if iterations is None else randomized_svd(key, w, target.rank, iterations)
        a, b = balanced(svd._replace(sizes=svd.sizes / target.scale), target.rank)
        return a, b, residual(leaf, a, b, target)

    return low_rank("pissa", options, start, rslora=options.rslora)
