"""GraLoRA: a low-rank update for each of k x k blocks of a weight.

Paper: Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", NeurIPS 2025,
arXiv 2505.20355.

    y_j = (x·W)_j + s · Σ_i (x_i·a_ijᵀ)·b_ji      x and y cut into k blocks, s = alpha / (r + h)
    a_ij [r/k, in/k], b_ji [r/k, out/k]           kept as a [k, r, in/k], b [k, r, out/k]
    with `general` a LoRA of that rank besides:   y += s · (x·cᵀ)·d,  c [h, in], d [h, out]

Trained: (r + h)·(in + out) numbers a weight, as LoRA, float32, for an update of rank up to k·r; a uniform,
±√(k/in), c ±1/√in, b = d = 0 at first. Backward keeps x, which the layer shares with its neighbors, and
recomputes the r + h numbers between the factors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class GraloraOptions(DropoutOptions, RankOptions):
    """Those of `gralora`.

    Attributes:
        rank: r, of all blocks of a row together; `blocks` divides it.
        alpha: numerator of the scale.
        blocks: k, into how many the inputs and the outputs of each weight are cut.
        general: h, the rank of a LoRA of the whole weight besides.
    """

    rank: int = 32
    alpha: float = 64.0
    blocks: int = 2
    general: int = 0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        positive(caller, "blocks", self.blocks)
        at_least(caller, "general", self.general, 0)


@register(
    kind="adapter",
    paper="GraLoRA, Jung et al. 2025, arXiv 2505.20355",
    trains="r·(in + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(
        example={
            "rank": 2,
            "alpha": 4.0,
            "general": 1,
            "targets": r"(?!.*(head|classifier|router|conv_1)/).*kernel",
        }
    ),
)
@takes(GraloraOptions)
def gralora(options: GraloraOptions) -> Transform:
    """Add a low-rank matrix to each of k x k blocks of the targeted weights (arXiv 2505.20355).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or blocks that do not fit the
            parameters.
    """
    k, general = options.blocks, options.general

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        (n, m), rank, stack = target.layout.matrix, target.rank, target.stack
        if n % k or m % k or rank % k:
            raise PeftError(
                f"gralora: {k} blocks do not divide rank {rank} or {target.path!r}, a matrix of {n} x {m}; "
                "choose another number or exclude it"
            )
        own, whole = jax.random.split(key)
        trained = {
            "a": _uniform(own, (*stack, k, rank, n // k), n // k),
            "b": jnp.zeros((*stack, k, rank, m // k)),
        }
        if general:
            trained["c"] = _uniform(whole, (*stack, general, n), n)
            trained["d"] = jnp.zeros((*stack, general, m))
        return trained, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        blocks = Blocks(options.alpha / (target.rank + general))
        return Mapped(base, slots, target.layout, blocks, "beside", options.dropout, keys)

    return of_weights("gralora", options, start, weight, one_way=True, dropout=options.dropout)


def _uniform(key: Array, shape: tuple[int, ...], inputs: int) -> Array:
    bound = 1.0 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


@dataclass(frozen=True)
class Blocks:
    """The map of k x k low-rank blocks."""

    scale: float

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """Each block of x to r numbers, a k-th of them for each block of the result."""
        slots = {slot: array.astype(x.dtype) for slot, array in slots.items()}
        a, b = slots["a"], slots["b"]
        k, rank = a.shape[:2]
        blocks = x.reshape(*x.shape[:-1], k, -1)
        # [..., i, j, r/k], as block j takes them: [..., j, i, r/k]
        z = jnp.einsum("...in,irn->...ir", blocks, a).reshape(*x.shape[:-1], k, k, rank // k)
        z = z.swapaxes(-3, -2).reshape(*x.shape[:-1], k, rank)
        y = jnp.einsum("...jr,jrm->...jm", z, b).reshape(*x.shape[:-1], -1)
        if "c" in slots:
            y = y + (x @ slots["c"].T) @ slots["d"]
        return self.scale * y
