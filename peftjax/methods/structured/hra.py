"""HRA: reflect the inputs of a weight, in r hyperplanes.

Paper: Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
Adaptation", NeurIPS 2024, arXiv 2405.17484.

    y = (x·R)·W      R = H_r ··· H_2·H_1,  H_i = I - 2uᵢuᵢᵀ / |uᵢ|²       u [r, in]
                     R = (I - 2QQᵀ)·(I - 2Q₀Q₀ᵀ)                          with `orthogonal`

where Q [in, r] are the u made orthonormal (Gram-Schmidt), and Q₀ what they are at first, not trained.

Trained: u, r·in numbers a weight, float32, uniform, ±1/√r. Without `orthogonal` r is even and each second u
is a copy of the one before it, so that R = I at first. Backward keeps x and x·R. The reflections are one
product `x - (x·u)·S·uᵀ` with a triangular S of r x r: R, of in x in, is not formed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular

from peftjax.core.errors import PeftError
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class HraOptions(RankOptions):
    """Those of `hra`.

    Attributes:
        orthogonal: whether the directions are made orthogonal, by Gram-Schmidt; the rank may be odd then.
    """

    orthogonal: bool = False


@register(
    kind="adapter",
    paper="HRA, Yuan et al. 2024, arXiv 2405.17484",
    trains="r·in",
    backward_keeps="x (shared) and x·R",
    conformance=Conformance(example={"rank": 2}),
)
@takes(HraOptions)
def hra(options: HraOptions) -> Transform:
    """Reflect the inputs of the targeted weights (arXiv 2405.17484).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        rank, n = target.rank, target.layout.matrix[0]
        if rank % 2 and not options.orthogonal:
            raise PeftError(
                f"hra: rank {rank} of {target.path!r} is odd, and reflections are no change at first in "
                "pairs only; choose an even rank, or orthogonal=True"
            )
        drawn, bound = rank if options.orthogonal else rank // 2, 1.0 / math.sqrt(rank)
        u = jax.random.uniform(key, (*target.stack, drawn, n), minval=-bound, maxval=bound)
        if options.orthogonal:
            return {"u": u}, {"start": jnp.linalg.qr(u.swapaxes(-1, -2))[0].swapaxes(-1, -2)}
        return {"u": jnp.repeat(u, 2, axis=-2)}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        reflect = _reflected_at_once if options.orthogonal else _reflected
        return Mapped(base, slots, target.layout, reflect, "before")

    # A layer that is not chosen has directions of 0, and no reflection.
    return of_weights("hra", options, start, weight, one_way=True)


def _reflected(slots: Mapping[str, Array], x: Array) -> Array:
    """Reflected in one hyperplane after the other, the last one first."""
    u = slots["u"]
    norm = jnp.linalg.norm(jnp.where(jnp.any(u != 0, axis=-1, keepdims=True), u, 1.0), axis=-1, keepdims=True)
    u = u / norm
    # H_1···H_r = I - u·S⁻¹·uᵀ, and R is its transpose.
    s = 0.5 * jnp.eye(len(u), dtype=u.dtype) + jnp.triu(u @ u.T, 1)
    back = solve_triangular(s, u, lower=False).astype(x.dtype)
    return x - (x @ back.T) @ u.astype(x.dtype)


def _reflected_at_once(slots: Mapping[str, Array], x: Array) -> Array:
    """Reflected in all orthogonal directions, and back in those of the start."""
    u, start = slots["u"], slots["start"]
    chosen = jnp.any(u != 0)
    u = jnp.where(chosen, u, jnp.eye(*u.shape, dtype=u.dtype))
    # QQᵀ = u·(uᵀu)⁻¹·uᵀ
    dual = cho_solve(cho_factor(u @ u.T), u)
    y = x - 2.0 * (x @ u.T.astype(x.dtype)) @ jnp.where(chosen, dual, 0.0).astype(x.dtype)
    return y - 2.0 * (y @ start.T.astype(x.dtype)) @ start.astype(x.dtype)
