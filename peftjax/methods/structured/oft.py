"""OFT: rotate the inputs of a weight, a block of them at a time.

Papers: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv
2306.07280; Qiu et al., "Orthogonal Finetuning Made Scalable" (OFTv2), 2025, arXiv 2506.19847.

    y = (x·R)·W      R = diag(R_1 ... R_k), blocks b x b      Q_j skew, trained, zero at first
    R_j = (I + Q_j)(I - Q_j)⁻¹                                exact, `terms=None`
    R_j ≈ I + 2Q_j + 2Q_j² + ... + 2Q_j^(t-2) + Q_j^(t-1)     of t terms, OFTv2's

Trained: the entries above the diagonal of each Q, in·(b - 1)/2 numbers a weight, or b·(b - 1)/2 with `shared`
blocks. Backward keeps x and x·R. With `radius` (COFT) each Q is drawn back into a ball around 0 of radius
`radius / √k` in every forward; the gradient is that of the point it is drawn to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._skew import cayley, skew
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class OftOptions(TargetOptions):
    """Those of `oft`.

    Attributes:
        block: b, the size of a block; it divides the inputs of each weight.
        terms: of the series for R, at least 2; None for the exact one.
        shared: whether all blocks of a weight are the same.
        radius: of the ball that each Q stays in; by default it is free.
    """

    block: int = 32
    terms: int | None = 5
    shared: bool = False
    radius: float | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        if self.block < 2:
            raise PeftError(f"{caller}: block must be at least 2, got {self.block}")
        if self.terms is not None and self.terms < 2:
            raise PeftError(f"{caller}: terms must be at least 2, or None for the exact rotation")
        if self.radius is not None:
            positive(caller, "radius", self.radius)


@register(
    kind="adapter",
    paper="OFT, Qiu et al. 2023, arXiv 2306.07280",
    trains="in·(b - 1)/2",
    backward_keeps="x (shared) and x·R",
    conformance=Conformance(example={"block": 2, "targets": r"(?!.*conv).*kernel"}),
)
@takes(OftOptions)
def oft(options: OftOptions) -> Transform:
    """Rotate the inputs of the targeted weights (arXiv 2306.07280, 2506.19847).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or blocks that do not fit the
            parameters.
    """
    rotation = Rotation(options.block, options.terms, options.radius)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        inputs, size = target.layout.matrix[0], options.block
        if inputs % size:
            raise PeftError(
                f"oft: blocks of {size} do not divide the {inputs} inputs of {target.path!r}; choose another "
                "size or exclude it"
            )
        blocks = 1 if options.shared else inputs // size
        return {"skew": jnp.zeros((*target.stack, blocks, size * (size - 1) // 2))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        return Mapped(base, slots, target.layout, rotation, "before")

    return of_weights("oft", options, start, weight, one_way=True)


@dataclass(frozen=True)
class Rotation:
    """The map `x·R`, of blocks of this size."""

    size: int
    terms: int | None
    radius: float | None

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """Each block of x rotated; R is formed in float32."""
        q = skew(slots["skew"].astype(jnp.float32), self.size)
        if self.radius is not None:
            q = _drawn_back(q, self.radius / len(q) ** 0.5)
        r = cayley(q, self.terms).astype(x.dtype)
        blocks = x.reshape(*x.shape[:-1], -1, self.size)
        r = jnp.broadcast_to(r, (blocks.shape[-2], self.size, self.size))
        return jnp.einsum("...kb,kbc->...kc", blocks, r).reshape(x.shape)


def _drawn_back(q: Array, radius: float) -> Array:
    """Each matrix, at most so far from 0; the gradient passes straight through."""
    norm = jnp.linalg.norm(q, axis=(-2, -1), keepdims=True)
    near = jnp.where(norm > radius, q * (radius / jnp.where(norm > 0, norm, 1.0)), q)
    return q + lax.stop_gradient(near - q)
