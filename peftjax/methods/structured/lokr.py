"""LoKr: an update that is the Kronecker product of two small matrices, the larger one of low rank.

Paper: Yeh et al., "Navigating Text-To-Image Customization", ICLR 2024, arXiv 2309.14859.

    y = x·W + s · vec(w₁ᵀ·X·w₂)      x cut into the rows of X [m, n], in = m·n, out = l·k      s = alpha / r
    w₁ [m, l], w₂ [n, k]             of rank r where r < max(n, k) / 2: w₂ = a₂ᵀb₂, a₂ [r, n], b₂ [r, k];
                                     so is w₁ with `decompose_both`

Trained: m·l + r·(n + k) numbers a weight, float32. At first w₁, or its b₁, is 0, and the others are uniform:
w₂ and a ±1/√(their inputs), b₂ ±1/√r. Backward keeps x, which the layer shares with its neighbors, and
recomputes what is between the factors. The product of in·out numbers is never formed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._options import ScaledOptions
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class LokrOptions(ScaledOptions):
    """Those of `lokr`.

    Attributes:
        factor: m and l, where it divides the inputs and the outputs; elsewhere, and by default, the largest
            divisor up to the root, and up to `factor`.
        decompose_both: whether w₁ may be of rank r too.
    """

    factor: int | None = None
    decompose_both: bool = False

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        if self.factor is not None:
            positive(caller, "factor", self.factor)

    def shapes_of(self, target: Target) -> dict[str, tuple[int, int]]:
        """The arrays of one matrix."""
        (inputs, outputs), rank = target.layout.matrix, target.rank
        (m, n), (left, k) = factors_of(inputs, self.factor), factors_of(outputs, self.factor)
        shapes = {"w1": (m, left), "w2": (n, k)}
        if self.decompose_both and rank < max(m, left) / 2:
            shapes = {"a1": (rank, m), "b1": (rank, left), "w2": (n, k)}
        if rank < max(n, k) / 2:
            del shapes["w2"]
            shapes |= {"a2": (rank, n), "b2": (rank, k)}
        return shapes


@register(
    kind="adapter",
    paper="LoKr, Yeh et al. 2024, arXiv 2309.14859",
    trains="m·l + r·(in/m + out/l)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 1, "alpha": 4.0}),
)
@takes(LokrOptions)
def lokr(options: LokrOptions) -> Transform:
    """Add a Kronecker product of two matrices to the targeted weights (arXiv 2309.14859).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        trained = {}
        for slot, shape in options.shapes_of(target).items():
            bound = 0.0 if slot in ("w1", "b1") else 1.0 / math.sqrt(shape[1] if slot[0] == "a" else shape[0])
            key, own = jax.random.split(key)
            trained[slot] = jax.random.uniform(own, (*target.stack, *shape), minval=-bound, maxval=bound)
        return trained, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        return Mapped(base, slots, target.layout, Kronecker(options.scale_of(target)), "beside")

    return of_weights("lokr", options, start, weight, one_way=True)


def factors_of(size: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is the size: the factor and the rest, or the nearest, the smaller first."""
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor is None else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return first, size // first


@dataclass(frozen=True)
class Kronecker:
    """The map of a Kronecker product."""

    scale: float

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """`scale · vec(w₁ᵀ·X·w₂)`; the side of w₂ that x meets first, then w₁, then its other side."""
        slots = {slot: array.astype(x.dtype) for slot, array in slots.items()}
        first = slots["w1"] if "w1" in slots else slots["a1"].T @ slots["b1"]
        rows = x.reshape(*x.shape[:-1], len(first), -1)
        z = rows @ (slots["w2"] if "w2" in slots else slots["a2"].T)
        z = jnp.einsum("...mz,ml->...lz", z, self.scale * first)
        if "b2" in slots:
            z = z @ slots["b2"]
        return z.reshape(*x.shape[:-1], -1)
