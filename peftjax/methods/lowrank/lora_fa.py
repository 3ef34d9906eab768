"""LoRA-FA: LoRA with the first factor frozen, so that backward needs no layer input.

Paper: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
Fine-tuning", arXiv 2308.03303.

    y = x·W + s · (x·aᵀ)·b        a frozen, b trained

Trained: r·out numbers a weight. Backward keeps, per adapted layer, only the thin x·aᵀ. `a` is part of
`frozen.state`: nothing can make it trainable later. With `nearest_gradient=True`, the paper's second version,
b takes the step whose product is nearest to the gradient G of the whole weight:

    ∇b ← (a·aᵀ)⁻¹ ∇b / s²        the minimum of ‖G - s aᵀ·δb‖ over δb, since ∇b = s a·G

with 1e-8 on the diagonal, as in the optimizer that Hugging Face's PEFT has. Defaults are those of LoRA.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.derivatives import with_backward
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_embedding
from peftjax.methods._targets import Target, all_layers
from peftjax.methods.lowrank._options import LoraOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank

_RIDGE = 1e-8  # on the diagonal of a·aᵀ


@dataclass(frozen=True, kw_only=True)
class LoraFaOptions(LoraOptions):
    """Those of `lora`, and one more.

    Attributes:
        nearest_gradient: give b the gradient of the second version (equation above) instead of its own, so
            that any optimizer takes steps as LoRA-FA's own.
    """

    nearest_gradient: bool = False

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        if self.init == "zero_a":
            raise PeftError(
                f"{caller} keeps `a` as it starts, and from a = 0 nothing is learned; choose another init"
            )


@register(
    kind="adapter",
    paper="LoRA-FA, Zhang et al. 2023, arXiv 2308.03303",
    trains="r·out",
    backward_keeps="x·aᵀ only",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0}),
)
@takes(LoraFaOptions)
def lora_fa(options: LoraFaOptions) -> Transform:
    """Low-rank adaptation with frozen `a` (arXiv 2308.03303).

    Raises:
        PeftError: as `lora`.
    """

    def start(key: Array, target: Target, leaf: Any) -> tuple[Array, Array, Any]:
        a, b, leaf = options.start(key, target, leaf)
        if is_embedding(target.path):
            a, b = jax.random.normal(key, a.shape), jnp.zeros_like(b)
        return a, b, leaf

    wrap = Wrap(_with_nearest_gradient) if options.nearest_gradient else None
    method = low_rank(
        "lora_fa", options, start, rslora=options.rslora, wrap=wrap, trained=("b",), one_way=True
    )
    if not options.nearest_gradient:
        return method

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        frozen, trainable = method.init(key, params)
        state = {path: {**slots, "inverse": _inverse(slots["a"])} for path, slots in frozen.state.items()}
        return replace(frozen, state=state), trainable

    return replace(method, init=init)


def _inverse(a: Array) -> Array:
    """(a·aᵀ)⁻¹, float32 `[*stack, r, r]`."""
    a = a.astype(jnp.float32)
    gram = jnp.matmul(a, jnp.matrix_transpose(a), precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.inv(gram + _RIDGE * jnp.eye(a.shape[-2]))


def _with_nearest_gradient(target: Target, weight: LowRank, slots: Any) -> LowRank:
    inverse = all_layers(slots["inverse"], target) / target.scale**2
    return replace(weight, b=_times_in_backward(weight.b, inverse))


def _times_in_backward(b: Array, matrix: Array) -> Array:
    """`b`, whose gradient is multiplied by the matrix; forward mode has `b`'s own derivative."""
    return with_backward(
        lambda b, matrix: b, lambda b, matrix: (b, matrix), _backward, linear=lambda matrix, g: (g, None)
    )(b, matrix)


def _backward(matrix: Array, gradient: Array) -> tuple[Array, Array]:
    nearest = jnp.matmul(matrix, gradient.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return nearest.astype(gradient.dtype), jnp.zeros_like(matrix)
