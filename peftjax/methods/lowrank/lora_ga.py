"""LoRA-GA: LoRA whose first step follows the gradient of the whole weight.

Paper: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv
2407.05000.

    G = U Σ Vᵀ, the gradient [in, out] of some batches      c = out^¼ / √gamma
    a₀ = c · r of the first 2r columns of U, transposed      b₀ = c · the r others of V, transposed
    y = x·W + s · ((x·aᵀ)·b - (x·a₀ᵀ)·b₀)                    s = alpha / √r

The first change of the weight is then a multiple of the best approximation of G of rank 2r. Trained: a and b,
r·(in + out) numbers a weight. The first factors are kept beside them, so that W stays as it is, of any form.
Backward keeps what LoRA's does. `gradients` come from `peftjax.calibrate.mean_gradient`. Defaults: rsLoRA's
scale and gamma = 16; a takes the first r directions, b the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.core.linalg import svd_of
from peftjax.methods.lowrank._factors import ScaledTarget
from peftjax.methods.lowrank._from_data import FromDataOptions, from_factors, require_data, statistics_of
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]


@dataclass(frozen=True, kw_only=True)
class LoraGaOptions(FromDataOptions, ScaleOptions):
    """Those of `lora` but `init`, and more.

    Attributes:
        gradients: of the loss, arrays of the targets' shapes by path.
        direction: which of them go where: 'ArB2r' the first r to a and the next r to b, 'A2rBr' the other
            way round, 'ArBr' in turn, 'random' drawn for each weight.
        gamma: the larger, the smaller are the factors at first.
        rslora: scale by alpha / sqrt(r), as in the paper; else by alpha / r.
    """

    gradients: Mapping[str, jax.Array] | None = None
    direction: Direction = "ArB2r"
    gamma: float = 16.0
    rslora: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "direction", self.direction, get_args(Direction))
        positive(caller, "gamma", self.gamma)
        require_data(caller, self.loaded, "gradients", self.gradients, "peftjax.calibrate.mean_gradient")


@register(
    kind="adapter",
    paper="LoRA-GA, Wang et al. 2024, arXiv 2407.05000",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "loaded": True}),
)
@takes(LoraGaOptions)
def lora_ga(options: LoraGaOptions) -> Transform:
    """Low-rank adaptation that starts from a gradient (arXiv 2407.05000).

    A saved method has `loaded=True`, and the start from its file.

    Raises:
        PeftError: as `lora`; here without gradients; in `init` for gradients that do not fit the parameters,
            or a rank larger than half of a weight's smaller side.
    """
    gradients = options.gradients or {}

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array]:
        (n, m), r = target.layout.matrix, target.rank
        if 2 * r > min(n, m):
            raise PeftError(
                f"lora_ga: rank {r} takes 2·{r} directions of {target.path!r}, a matrix of {n} x {m}; lower "
                "rank, set rank_pattern, or exclude it"
            )
        svd = svd_of(statistics_of("lora_ga", "gradients", gradients, target))
        of_a, of_b = _directions(key, options.direction, r)
        size = m**0.25 / options.gamma**0.5
        return size * svd.u[..., of_a].swapaxes(-1, -2), size * svd.vt[..., of_b, :]

    return from_factors("lora_ga", options, start, rslora=options.rslora)


def _directions(key: Array, direction: Direction, r: int) -> tuple[Array, Array]:
    """The numbers of the singular directions that each factor takes, of the first 2r."""
    first, second = jnp.arange(r), jnp.arange(r, 2 * r)
    if direction == "random":
        drawn = jax.random.permutation(key, 2 * r)
        return drawn[:r], drawn[r:]
    orders = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (2 * first + 1, 2 * first)}
    return orders[direction]
