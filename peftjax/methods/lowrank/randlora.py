"""RandLoRA: an update of full rank, of random bases for the whole model and their trained scales.

Paper: Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", ICLR 2025, arXiv
2502.00987.

    W' = W + alpha/r · Σ_k p_k · q_kᵀ,  k < K = r·⌈s/r⌉      s and l the shorter and the longer side of W
    q_k = Λ_ij · A_i ∘ Γ_j,  k = (i, j)      A [r, s] and the columns p_k of B [l, K] random, frozen
                                             Λ [r, K/r], Γ [K/r, s] trained

Trained: Λ and Γ, about s + s²/r numbers a weight, float32; Λ = 0 and Γ = 1/max of its sides at first. The
update has no thin form: each layer forms it, and with bases="drawn" the bases too, from one seed, so that
they are never stored. Backward keeps x. Defaults are those of the usual PyTorch library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._noise import noise
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@dataclass(frozen=True, kw_only=True)
class RandloraOptions(DropoutOptions, RankOptions):
    """Those of `randlora`.

    Attributes:
        rank: r, the rows of A; the larger, the fewer numbers are trained.
        alpha: numerator of the scale.
        bases: 'drawn' in each layer when they are needed, or 'stored', once for the model.
    """

    rank: int = 32
    alpha: float = 640.0
    bases: Literal["drawn", "stored"] = "drawn"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)
        one_of(caller, "bases", self.bases, ("drawn", "stored"))


@register(
    kind="adapter",
    paper="RandLoRA, Albert et al. 2025, arXiv 2502.00987",
    trains="about s + s²/r, s = min(in, out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 3, "alpha": 6.0}),
)
@takes(RandloraOptions)
def randlora(options: RandloraOptions) -> Transform:
    """Train the scales of random bases, for an update of full rank (arXiv 2502.00987).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        seed = jax.random.bits(key, (), jnp.uint32)
        if options.bases == "drawn":
            return {}, {"seed": seed}
        rank = max(target.rank for target in targets)
        n, m = (max(target.layout.matrix[side] for target in targets) for side in (0, 1))
        short, long = min(n, m), max(n, m)
        return {}, {"a": noise(seed, (rank, short)), "b": noise(seed + 1, (long, -(-short // rank), rank))}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        rank, short = target.rank, min(target.layout.matrix)
        count = -(-short // rank)
        gains = jnp.full((*target.stack, count, short), 1.0 / max(count, short), jnp.float32)
        return {"scales": jnp.zeros((*target.stack, rank, count)), "gains": gains}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        own = {"scales": slots["scales"], "gains": slots["gains"]}
        shared = {name: slots[name] for name in ("seed", "a", "b") if name in slots}
        change = Bases(*target.layout.matrix, target.rank, options.alpha / target.rank)
        return Added(base, own, target.layout, change, False, options.dropout, keys, shared)

    return of_weights("randlora", options, start, weight, share=share, dropout=options.dropout, one_way=True)


@dataclass(frozen=True)
class Bases:
    """The update of a matrix of n x m, by bases of so many rows."""

    n: int
    m: int
    rank: int
    scale: float

    @property
    def count(self) -> int:
        """How many times the rows of A are used."""
        return -(-min(self.n, self.m) // self.rank)

    def __call__(self, slots: Mapping[str, Array]) -> Array:
        """The update `[n, m]`."""
        short, long = min(self.n, self.m), max(self.n, self.m)
        if "seed" in slots:
            a = noise(slots["seed"], (self.rank, short))
            b = noise(slots["seed"] + 1, (long, self.count, self.rank))
        else:
            a, b = slots["a"][: self.rank, :short], slots["b"][:long, : self.count, : self.rank]
        rows = slots["scales"][:, :, None] * a[:, None] * slots["gains"]
        update = self.scale * b.reshape(long, -1) @ rows.reshape(-1, short)
        return update if self.n > self.m else update.T
