"""sigmaReparam: train each weight divided by its spectral norm, times a trained number.

Paper: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023,
arXiv 2303.06296.

    y = (gamma / σ) · (x·W)      σ = uᵀ W v      u [in], v [out] of norm 1, held constant in backward
    before each step:            u = W v / ‖W v‖      v = Wᵀu / ‖Wᵀu‖
    dW = (gamma / σ) (G - (⟨G, W⟩ / σ) u vᵀ)      dgamma = ⟨G, W⟩ / σ      G the gradient of the product

Trained: W, gamma, one a matrix, and, unless `train_rest=False`, all other parameters. Backward keeps the
layer's input x and its output before scaling. u and v are the method's state, which a checkpoint has. They
start as the first singular vectors; gamma starts as σ, so that the model is as it was, or with `start="one"`
as 1, the paper's choice for training from scratch. `merge` gives plain weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.checks import one_of
from peftjax.core.linalg import svd_of
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots
from peftjax.methods.structured._trained import TrainedOptions, of_trained_weights
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.options import takes
from peftjax.transform.registry import register
from peftjax.transform.transform import Advance, Loss, Transform
from peftjax.weights.canonical import to_logical
from peftjax.weights.scaled import Scaled

VECTORS = ("u", "v")
"""The slots of the state, which each step changes."""


@dataclass(frozen=True, kw_only=True)
class SigmaReparamOptions(TrainedOptions):
    """Those of `sigma_reparam`.

    Attributes:
        start: gamma at first, the spectral norm ('sigma') or 1 ('one').
    """

    start: Literal["sigma", "one"] = "sigma"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "start", self.start, ("sigma", "one"))


@register(
    kind="adapter",
    paper="sigmaReparam, Zhai et al. 2023, arXiv 2303.06296",
    trains="in·out + 1, and all that is not targeted",
    backward_keeps="x (shared) and the output before scaling",
    quantized_base=False,
)
@takes(SigmaReparamOptions)
def sigma_reparam(options: SigmaReparamOptions) -> Transform:
    """Train the targeted weights with spectral norms of their own (arXiv 2303.06296).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or a
            base that is not a plain array.
    """

    def start(key: Array, target: Target, w: Array) -> tuple[Slots, Slots]:
        svd = svd_of(w)
        sigma = svd.sizes[..., 0]
        gamma = jnp.where(sigma > 0, sigma, 1.0) if options.start == "sigma" else jnp.ones_like(sigma)
        return {"weight": w, "gamma": gamma}, {"u": svd.u[..., :, 0], "v": svd.vt[..., 0, :]}

    advance = Advance(lambda step: True, _advanced, VECTORS)
    return of_trained_weights("sigma_reparam", options, start, _weight, advances=(advance,))


def _weight(target: Target, dtype: str, slots: Mapping[str, Array]) -> Scaled:
    w, u, v = (slots[name].astype(jnp.float32) for name in ("weight", *VECTORS))
    sigma = jnp.einsum("...i,...io,...o->...", u, w, v, precision=lax.Precision.HIGHEST)
    # A weight that is all zero, such as the last one of a residual branch, has no norm to be divided by.
    factor = jnp.where(sigma > 0, slots["gamma"] / jnp.where(sigma > 0, sigma, 1.0), 1.0)
    return Scaled(to_logical(slots["weight"], target.layout).astype(dtype), factor, target.layout)


def _advanced(
    loss: Loss | None,
    frozen: Frozen,
    trainable: Trainable,
    optimizer: OptimizerState,
    *,
    step: Array,
    key: Array,
    part: int,
) -> tuple[Frozen, Trainable, OptimizerState]:
    state = {
        path: {**slots, **_iterated(trainable[path]["weight"], slots)} for path, slots in frozen.state.items()
    }
    return replace(frozen, state=state), trainable, optimizer


def _iterated(w: Array, slots: Mapping[str, Array]) -> dict[str, Array]:
    """One step of the power iteration; vectors that the weight maps to zero stay."""
    high: Any = {"precision": lax.Precision.HIGHEST}
    u = _unit(jnp.einsum("...io,...o->...i", w, slots["v"], **high), slots["u"])
    return {"u": u, "v": _unit(jnp.einsum("...io,...i->...o", w, u, **high), slots["v"])}


def _unit(x: Array, else_: Array) -> Array:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1.0), else_)
