"""OSF: train the smaller singular directions of a weight, and leave the space of the larger ones alone.

Paper: Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025,
arXiv 2504.07097.

    W = Uᵀ diag(σ) V      W_high the first k directions, frozen; the other q = min(in, out) - k trained
    y = x·W_high + (x·uᵀ)·(s ∘ v)                             u [q, in], s [q], v [q, out]
    du ← du - du·U_highᵀ·U_high, and dv likewise: gradients have no part in the frozen space

Trained: u, s and v, q·(in + out + 1) numbers a weight, float32: with k = min/2, the default, about as many as
the weight has. W itself is replaced by the k frozen directions, so that it is held once. Backward keeps x.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import positive
from peftjax.core.derivatives import with_backward
from peftjax.core.errors import PeftError
from peftjax.core.linalg import svd_of
from peftjax.core.naming import is_embedding
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._factors import plain_matrices
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.factored import Factored
from peftjax.weights.low_rank import LowRank
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class OsfOptions(TargetOptions):
    """Those of `osf`.

    Attributes:
        preserved: k, the directions that stay; by default half of the smaller side of each weight.
    """

    preserved: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "preserved", self.preserved)


@register(
    kind="adapter",
    paper="OSF, Nayak et al. 2025, arXiv 2504.07097",
    trains="(min(in, out) - k)·(in + out + 1)",
    backward_keeps="the input x (shared)",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"preserved": 2}),
)
@takes(OsfOptions)
def osf(options: OsfOptions) -> Transform:
    """Train the smaller singular directions of the targeted weights (arXiv 2504.07097).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, a
            base that is not a plain array, or a weight with no directions left to train.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        smaller = min(target.layout.matrix)
        kept = smaller // 2 if options.preserved is None else options.preserved
        if not 0 < kept < smaller:
            raise PeftError(
                f"osf: {target.path!r} has {smaller} directions, and of {kept} that stay none or all are "
                "left; set preserved, or exclude it"
            )
        svd = svd_of(plain_matrices("osf", target, base))
        u, s, v = svd.u.swapaxes(-1, -2), svd.sizes, svd.vt
        trained = {"u": u[..., kept:, :], "s": s[..., kept:], "v": v[..., kept:, :]}
        high = {"a": u[..., :kept, :], "b": s[..., :kept, None] * v[..., :kept, :]}
        return trained, high

    def weight(target: Target, base: Factored, slots: Mapping[str, Array], keys: Array | None) -> Weight:
        u, s, v = _outside(slots["u"], base.a), slots["s"], _outside(slots["v"], base.b)
        if is_embedding(target.path):
            return LowRank(base, u, s[..., None] * v, target.layout)
        # Not a factor s ∘ v, which would be kept beside v.
        return Mapped(base, {"u": u, "s": s, "v": v}, target.layout, _trained_part, "beside")

    method = of_weights("osf", options, start, weight)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = method.init(key, params)
        bases = {
            target.path: Factored(
                **frozen.state[target.path],
                layout=target.layout,
                of_dtype=tree.named_leaves(params)[target.path].dtype,
            )
            for target in frozen.plan
        }
        state = {target.path: {} for target in frozen.plan}
        return replace(frozen, params=tree.replace(params, bases), state=state), trainable

    return replace(method, init=init)


def _trained_part(slots: Mapping[str, Array], x: Array) -> Array:
    u, s, v = (slots[name].astype(x.dtype) for name in ("u", "s", "v"))
    return ((x @ u.T) * s) @ v


def _kept(rows: Array, frozen: Array) -> Array:
    return rows


def _kept_with(rows: Array, frozen: Array) -> tuple[Array, Array]:
    return rows, frozen


def _without_frozen(frozen: Array, cotangent: Array) -> tuple[Array, None]:
    """The part of the rows' gradient outside the space of the frozen directions."""
    lengths = jnp.linalg.norm(frozen, axis=-1, keepdims=True)
    frozen = frozen / jnp.where(lengths > 0.0, lengths, 1.0)
    inside = jnp.einsum("...qn,...kn->...qk", cotangent, frozen)
    return cotangent - inside @ frozen, None


_outside = with_backward(_kept, _kept_with, _without_frozen)
"""`(rows [*stack, q, n], orthogonal directions [*stack, k, n])`: the rows, their gradient projected."""
