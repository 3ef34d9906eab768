"""Riemannian preconditioned LoRA: each factor's gradient, scaled by the inverse Gram matrix of the other.

Paper: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", ICML 2024, arXiv
2402.02347.

    ∇a ← (b·bᵀ + δI)⁻¹ ∇a,      ∇b ← (a·aᵀ + δI)⁻¹ ∇b        a [r, in], b [r, out], the matrices r x r

With δ = 0 a small step changes aᵀb alike, however the product is split into factors. A rewrite of the
gradients before the optimizer, any of optax's; what is trained, and what backward keeps, is LoRA's, and no
state is added. The matrices are formed in float32 from the factors before the step. Default δ = 0.01, that of
Hugging Face's PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array, lax

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods.lowrank._options import LoraOptions
from peftjax.methods.lowrank.lora import low_rank
from peftjax.transform.around import Around, Own, require_together
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class RiemannianLoraOptions(LoraOptions):
    """Those of `lora`, and one more.

    Attributes:
        damping: δ, on the diagonals, without which a factor that is zero would have no inverse.
    """

    damping: float = 1e-2

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "damping", self.damping)


@register(
    kind="adapter",
    paper="Riemannian preconditioned LoRA, Zhang and Pilanci 2024, arXiv 2402.02347",
    trains="r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(RiemannianLoraOptions)
def riemannian_lora(options: RiemannianLoraOptions) -> Transform:
    """Low-rank adaptation with preconditioned gradients (arXiv 2402.02347).

    Raises:
        PeftError: as `lora`, or when the damping is not positive; in an update without the trainable, or with
            one of a weight's factors alone.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Own, Any]:
        if params is None:
            raise PeftError(
                "riemannian_lora: the update needs the factors; call tx.update(gradients, state, trainable)"
            )
        require_together("riemannian_lora", updates)
        return {
            path: _preconditioned(own, params[path], options.damping) if "a" in own else own
            for path, own in updates.items()
        }, state

    gradients = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    around = Around(gradients=gradients)
    return low_rank("riemannian_lora", options, options.start, rslora=options.rslora, around=around)


def _preconditioned(
    gradients: Mapping[str, Array], factors: Mapping[str, Array], damping: float
) -> dict[str, Array]:
    return {
        **gradients,
        "a": _solved(factors["b"], gradients["a"], damping),
        "b": _solved(factors["a"], gradients["b"], damping),
    }


def _solved(factor: Array, gradient: Array, damping: float) -> Array:
    """`(f·fᵀ + δI)⁻¹ g` for `f [*stack, r, n]` and `g [*stack, r, m]`, in the dtype of g."""
    f = factor.astype(jnp.float32)
    gram = jnp.matmul(f, jnp.matrix_transpose(f), precision=lax.Precision.HIGHEST)
    gram += damping * jnp.eye(f.shape[-2])
    return jnp.linalg.solve(gram, gradient.astype(jnp.float32)).astype(gradient.dtype)
