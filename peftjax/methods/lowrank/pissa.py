"""PiSSA: LoRA that starts from, and trains, the principal part of each weight.

Paper: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS 2024,
arXiv 2404.02948.

    W = U Σ Vᵀ      a = (√(Σ_r / s)·U_rᵀ)      b = (√(Σ_r / s)·V_rᵀ)      base = W − s·aᵀb

Trained and kept by backward: as LoRA. The base given to `init` is not changed: the residual is a new
array in the frozen parameters. The start needs a plain floating-point base.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
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
        u, sizes, vt = (
            jnp.linalg.svd(w, full_matrices=False)
            if iterations is None
            else _randomized_svd(key, w, target.rank, iterations)
        )
        r = target.rank
        root = jnp.sqrt(sizes[..., :r] / target.scale)[..., None]
        a = root * u[..., :r].swapaxes(-1, -2)
        b = root * vt[..., :r, :]
        return a, b, residual(leaf, a, b, target)

    return low_rank("pissa", options, start, rslora=options.rslora)


def _randomized_svd(key: Array, w: Array, rank: int, iterations: int) -> tuple[Array, Array, Array]:
    """The leading part of an SVD by subspace iteration, with a few columns more than the rank."""
    width = min(rank + 8, *w.shape[-2:])
    y = w @ jax.random.normal(key, (*w.shape[:-2], w.shape[-1], width))
    for _ in range(iterations):
        y = w @ (w.swapaxes(-1, -2) @ jnp.linalg.qr(y)[0])
    q = jnp.linalg.qr(y)[0]
    u, sizes, vt = jnp.linalg.svd(q.swapaxes(-1, -2) @ w, full_matrices=False)
    return q @ u, sizes, vt
