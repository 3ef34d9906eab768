"""KaSA: LoRA with trained singular values, on a base without its smallest singular directions.

Paper: Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", ICLR 2025,
arXiv 2412.06071.

    W = U Σ Vᵀ      W' = U_k Σ_k V_kᵀ + s · aᵀ diag(d) b      k = min(in, out) - r,  s = alpha / r

Trained: a, b and d, r·(in + out + 1) numbers a weight. Backward keeps x (shared), x·aᵀ and diag(d) b. The
optimizer adds the gradients of β Σ d² + γ Σ (‖a aᵀ - I‖ + ‖b bᵀ - I‖), over all weights; the loss that a step
reports has no penalty. The base is a new array in the frozen parameters. Start: a as in LoRA, b = 0,
d ~ N(0, 1); the outputs are those of the cut base. Defaults of β and γ are the authors' on GLUE.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from jax import Array

from peftjax.core.checks import at_least
from peftjax.core.errors import PeftError
from peftjax.core.linalg import svd_of
from peftjax.methods._targets import Target
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices, start_uniform
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank._orthogonality import slope_of_excess
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.around import Around, Own, require_together
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.canonical import to_logical
from peftjax.weights.low_rank import LowRank
from peftjax.weights.sharding import like


@dataclass(frozen=True, kw_only=True)
class KasaOptions(ScaleOptions):
    """Those of `lora` but `init`, and two more.

    Attributes:
        beta: of the penalty on the singular values.
        gamma: of the penalty on factors whose rows are not orthonormal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        at_least(caller, "beta", self.beta, 0)
        at_least(caller, "gamma", self.gamma, 0)


@register(
    kind="adapter",
    paper="KaSA, Wang et al. 2025, arXiv 2412.06071",
    trains="r·(in + out + 1)",
    backward_keeps="the input x (shared), x·aᵀ and diag(d) b",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}, starts_as_base=False),
)
@takes(KasaOptions)
def kasa(options: KasaOptions) -> Transform:
    """Low-rank adaptation in the form of singular values, on a cut base (arXiv 2412.06071).

    Raises:
        PeftError: as `lora`; in `init`, when a base is not a plain array, or has no more directions than the
            rank.
    """

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Array]:
        kept = min(target.layout.matrix) - target.rank
        if kept < 1:
            raise PeftError(
                f"kasa: rank {target.rank} leaves nothing of {target.path!r}, a matrix of "
                f"{target.layout.matrix[0]} x {target.layout.matrix[1]}; lower rank, or exclude it"
            )
        svd = svd_of(plain_matrices("kasa", target, leaf))
        cut = (svd.u * svd.sizes[..., None, :])[..., :kept] @ svd.vt[..., :kept, :]
        a, b, _ = start_uniform(key, target, leaf)
        return a, b, like(to_logical(cut, target.layout), leaf).astype(leaf.dtype)

    def singular_values(key: Array, target: Target, base: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        return {"d": jax.random.normal(key, (*target.stack, target.rank))}, {}

    def scaled(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> LowRank:
        return replace(weight, b=slots["d"][..., None] * weight.b)

    return low_rank(
        "kasa",
        options,
        start,
        rslora=options.rslora,
        wrap=Wrap(scaled, singular_values),
        around=Around(gradients=_penalize(options.beta, options.gamma)),
    )


def _penalize(beta: float, gamma: float) -> optax.GradientTransformationExtraArgs:
    """Add the gradients of `beta Σ d² + gamma Σ (‖a aᵀ - I‖ + ‖b bᵀ - I‖)` over all weights."""

    def init(params: Own) -> optax.EmptyState:
        require_together("kasa", params)
        return optax.EmptyState()

    def update(
        updates: Own, state: optax.EmptyState, params: Own | None = None, **extra: object
    ) -> tuple[Own, optax.EmptyState]:
        if params is None:
            raise PeftError("kasa: the update needs the parameters; call tx.update(grads, state, params)")

        def added(path: str, slot: str, grad: Array) -> Array:
            value = params[path][slot]
            if slot == "d":
                return grad + (2.0 * beta * value).astype(grad.dtype)
            if slot in ("a", "b"):
                return grad + (gamma * slope_of_excess(value)).astype(grad.dtype)
            return grad

        new = {
            path: {slot: added(path, slot, grad) for slot, grad in slots.items()}
            for path, slots in updates.items()
        }
        return new, state

    return optax.GradientTransformationExtraArgs(init, update)
