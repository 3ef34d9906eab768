"""VB-LoRA: low-rank factors put together from one bank of short vectors for the whole model.

Paper: Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", NeurIPS 2024, arXiv
2405.15179.

    piece = Σ_k softmax(l)_k bank_k     over the largest `chosen` of the piece's logits l [vectors]
    y = x·W + (x·aᵀ)·b      a [r, in], b [r, out], rows of pieces; bank [vectors, length]

Trained: the bank, once, and the logits, r·(in + out)/length·vectors numbers a weight, float32; which vectors
are chosen changes with them. Backward keeps x and x·aᵀ, and forms a and b again. Start: bank ~ U(±0.02),
logits ~ N(0, 0.1²): the update is small and not zero, as both factors come from one bank. Defaults are the
usual PyTorch library's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import chosen, of_chosen
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.derived import Derived


@dataclass(frozen=True, kw_only=True)
class VbloraOptions(DropoutOptions, RankOptions):
    """Those of `vblora`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        vectors: of the bank.
        length: of a vector; it divides the inputs and outputs of each weight.
        chosen: how many vectors a piece is made of.
        bank_bound: what the bank's numbers are at most at the start.
        logits_std: of the logits at the start.
    """

    rank: int = 4
    vectors: int = 256
    length: int = 256
    chosen: int = 2
    bank_bound: float = 0.02
    logits_std: float = 0.1

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        for name in ("vectors", "length", "chosen", "bank_bound", "logits_std"):
            positive(caller, name, getattr(self, name))
        if self.chosen > self.vectors:
            raise PeftError(
                f"{caller}: chosen {self.chosen} is more than the {self.vectors} vectors of the bank"
            )


@register(
    kind="adapter",
    paper="VB-LoRA, Li et al. 2024, arXiv 2405.15179",
    trains="r·(in + out)/length·vectors",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(
        example={"rank": 2, "vectors": 5, "length": 1, "bank_bound": 0.5, "targets": ".*kernel"},
        starts_as_base=False,
    ),
)
@takes(VbloraOptions)
def vblora(options: VbloraOptions) -> Transform:
    """Low-rank adaptation with factors from a bank of vectors (arXiv 2405.15179).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or a length that does not divide a weight.
    """

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        bound, shape = options.bank_bound, (options.vectors, options.length)
        return {"bank": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}, {}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        n, m = target.layout.matrix
        if n % options.length or m % options.length:
            raise PeftError(
                f"vblora: length {options.length} does not divide both sides of {target.path!r}, a matrix of "
                f"{n} x {m}; choose another or exclude it"
            )
        trained = {}
        for name, own, side in zip(("logits_a", "logits_b"), jax.random.split(key), (n, m)):
            shape = (*target.stack, target.rank, side // options.length, options.vectors)
            trained[name] = options.logits_std * jax.random.normal(own, shape)
        return trained, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Derived:
        own = {name: slots[name] for name in ("logits_a", "logits_b")} | chosen(target)
        shared, factors = {"bank": slots["bank"]}, Pieces(options.chosen)
        return Derived(base, own, shared, target.layout, factors, 1.0, options.dropout, keys)

    return of_weights("vblora", options, start, weight, share=share, dropout=options.dropout)


@dataclass(frozen=True)
class Pieces:
    """The factors of one matrix, their pieces made of so many vectors."""

    chosen: int

    def __call__(self, shared: Mapping[str, Array], slots: Mapping[str, Array]) -> tuple[Array, Array]:
        """The rows of both."""
        a, b = (self._rows(slots[name], shared["bank"]) for name in ("logits_a", "logits_b"))
        return a, of_chosen(b, slots)

    def _rows(self, logits: Array, bank: Array) -> Array:
        """The rows `[r, n]` whose pieces have these logits `[r, n / length, vectors]`."""
        best, indices = jax.lax.top_k(logits, self.chosen)
        pieces = jnp.einsum("...k,...kl->...l", jax.nn.softmax(best), bank[indices])
        return pieces.reshape(len(logits), -1)
