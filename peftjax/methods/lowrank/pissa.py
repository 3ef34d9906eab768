"""PiSSA: LoRA that starts from, and trains, the principal part of each weight.

Paper: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS 2024,
arXiv 2404.02948.

    W = U Σ Vᵀ      a = (√(Σ_r / s)·U_rᵀ)      b = (√(Σ_r / s)·V_rᵀ)      base = W − s·aᵀb

Trained and kept by backward: as LoRA. The base given to `init` is not changed: the residual is a new
array in the frozen parameters. The start needs a plain floating-point base.
"""

from typing import Any

from jax import Array

from peftjax.core.errors import PeftError
from peftjax.core.linalg import balanced, randomized_svd, svd_of
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, residual
from peftjax.methods.lowrank.lora import checked_options, low_rank
from peftjax.transform.transform import MethodInfo, Transform


def pissa(*, iterations: int | None = None, **options: Any) -> Transform:
    """Low-rank adaptation of the principal singular part (arXiv 2404.02948).

    Args:
        iterations: power iterations of a randomized SVD; None takes the exact SVD.
        **options: those of `lora`, `init` excepted; the paper uses dropout 0.

    Raises:
        PeftError: as `lora`; in `init`, when a base is not a plain array.
    """
    options = checked_options("pissa", options, leave_out=("init",))
    if iterations is not None and iterations < 1:
        raise PeftError(f"pissa: iterations must be positive, got {iterations}")

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Array]:
        w = plain_matrices("pissa", target, leaf)
        svd = svd_of(w) if iterations is None else randomized_svd(key, w, target.rank, iterations)
        a, b = balanced(svd._replace(sizes=svd.sizes / target.scale), target.rank)
        return a, b, residual(leaf, a, b, target)

    return low_rank("pissa", {**options, "iterations": iterations}, start)


METHOD = MethodInfo(
    name="pissa",
    factory=pissa,
    paper="PiSSA, Meng et al. 2024, arXiv 2404.02948",
    trains="r·(in + out)",
    keeps="the input x (shared) and x·aᵀ",
    quantized_base=False,
    replaces_base=True,
    example={"rank": 2, "alpha": 4.0},
)
