"""BOFT: rotate the inputs of a weight by blocks, in several rounds that mix the blocks as a butterfly does.

Paper: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024, arXiv
2311.06243.

    y = ((x·R)·W) ∘ s      R = B_(m-1) ··· B_1·B_0,  B_i = P_i·diag(R_i1 ... R_ik)·P_iᵀ, blocks b x b
    R_ij = (I + Q_ij)(I - Q_ij)⁻¹,  Q_ij skew, trained      s [out], trained

P_i shuffles each 2^i blocks by halves of a block, as that round of a fast Fourier transform; P_0 = I.

Trained: the entries above the diagonals of Q, m·in·(b - 1)/2 numbers a weight, 0 at first, and s, 1 at first,
float32. Backward keeps x, x·R and x·R·W. Weight decay would pull s to 0, and the layer with it: leave it off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._skew import cayley, skew
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class BoftOptions(TargetOptions):
    """Those of `boft`.

    Attributes:
        block: b, the size of a block, even where there are several rounds; 2^(rounds - 1) blocks divide the
            inputs of each weight.
        rounds: m, how often the inputs are rotated; one is OFT with a scale.
    """

    block: int = 4
    rounds: int = 1

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "rounds", self.rounds)
        if self.block < 2 or (self.rounds > 1 and self.block % 2):
            raise PeftError(
                f"{caller}: block must be at least 2, and even where there are several rounds, got "
                f"{self.block}"
            )


@register(
    kind="adapter",
    paper="BOFT, Liu et al. 2024, arXiv 2311.06243",
    trains="m·in·(b - 1)/2 + out",
    backward_keeps="x (shared), x·R and x·R·W",
    conformance=Conformance(example={"block": 2, "rounds": 2, "targets": r"(?!.*conv).*kernel"}),
)
@takes(BoftOptions)
def boft(options: BoftOptions) -> Transform:
    """Rotate the inputs of the targeted weights in a butterfly of blocks (arXiv 2311.06243).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or blocks that do not fit the
            parameters.
    """
    size, rounds = options.block, options.rounds
    butterfly = Butterfly(size, rounds)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        n, m = target.layout.matrix
        if n % (size << (rounds - 1)):
            raise PeftError(
                f"boft: {1 << (rounds - 1)} blocks of {size}, as {rounds} rounds mix, do not divide the {n} "
                f"inputs of {target.path!r}; choose another size, fewer rounds, or exclude it"
            )
        entries = (*target.stack, rounds, n // size, size * (size - 1) // 2)
        return {"skew": jnp.zeros(entries), "scale": jnp.ones((*target.stack, m))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Diagonal:
        rotated = Mapped(base, {"skew": slots["skew"]}, target.layout, butterfly, "before")
        return Diagonal(rotated, target.layout, by_output=slots["scale"])

    return of_weights("boft", options, start, weight, neutral={"scale": 1.0}, one_way=True)


@dataclass(frozen=True)
class Butterfly:
    """The map `x·R` of so many rounds of blocks of this size."""

    size: int
    rounds: int

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """Each block rotated in each round; the rotations are formed in float32."""
        rotations = cayley(skew(slots["skew"].astype(jnp.float32), self.size)).astype(x.dtype)
        for number in reversed(range(self.rounds)):
            order = shuffled(x.shape[-1], self.size, number)
            blocks = x[..., np.argsort(order)].reshape(*x.shape[:-1], -1, self.size)
            x = jnp.einsum("...kb,kbc->...kc", blocks, rotations[number]).reshape(x.shape)[..., order]
        return x


def shuffled(count: int, size: int, number: int) -> np.ndarray:
    """Of each 2^number blocks, the even halves of blocks and then the odd ones, by their numbers."""
    if number == 0:
        return np.arange(count)
    halves = np.arange(count).reshape(-1, 2 << number, size // 2)
    return np.concatenate([halves[:, ::2], halves[:, 1::2]], axis=1).reshape(-1)
