"""VeRA: one pair of random factors for the whole model, and two trained vectors for each weight.

Paper: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv 2310.11454.

    W' = W + Aᵀ diag(d) B diag(c)       A [r, in], B [r, out] frozen; d [r] = 0.1 and c [out] = 0 at first

Trained: r + out numbers a weight, float32. A and B are drawn once, uniform ±√(6/fan), as wide as the widest
target: each takes the first of their columns. Backward keeps x·Aᵀ, r numbers a token, and not x.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.methods._options import DropoutOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.derived import Derived


@dataclass(frozen=True, kw_only=True)
class VeraOptions(DropoutOptions):
    """Those of `vera`.

    Attributes:
        rank: r, the same for all weights; it may be larger than they are.
        d: what the inner vectors start from.
    """

    rank: int = 256
    d: float = 0.1

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "rank", self.rank)


@register(
    kind="adapter",
    paper="VeRA, Kopiczko et al. 2024, arXiv 2310.11454",
    trains="r + out",
    backward_keeps="x·Aᵀ",
    conformance=Conformance(example={"rank": 4}),
)
@takes(VeraOptions)
def vera(options: VeraOptions) -> Transform:
    """Train the scales of one random pair of factors on each targeted weight (arXiv 2310.11454).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.
    """
    rank = options.rank

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        return {}, random_factors(key, targets, rank, rank)

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        d = jnp.full((*target.stack, rank), options.d, jnp.float32)
        return {"d": d, "c": jnp.zeros((*target.stack, target.layout.matrix[1]))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Derived:
        own, shared = ({name: slots[name] for name in names} for names in (("d", "c"), ("a", "b")))
        factors = Scaled(*target.layout.matrix)
        return Derived(base, own, shared, target.layout, factors, 1.0, options.dropout, keys)

    return of_weights("vera", options, start, weight, share=share, dropout=options.dropout, one_way=True)


@dataclass(frozen=True)
class Scaled:
    """The factors of one matrix `[n, m]`, of the shared ones."""

    n: int
    m: int

    def __call__(self, shared: Mapping[str, Array], slots: Mapping[str, Array]) -> tuple[Array, Array]:
        """`A` and `diag(d) B diag(c)`."""
        b = slots["d"][:, None] * shared["b"][:, : self.m] * slots["c"]
        return shared["a"][:, : self.n], b


def random_factors(key: Array, targets: Sequence[Target], rows_a: int, rows_b: int) -> Slots:
    """A and B, as wide as the widest target: uniform ±√(6/fan), of all inputs or of the inner numbers."""
    n, m = (max(target.layout.matrix[side] for target in targets) for side in (0, 1))
    keys = jax.random.split(key)
    return {
        "a": _uniform(keys[0], (rows_a, n), fan=n),
        "b": _uniform(keys[1], (rows_b, m), fan=rows_b),
    }


def _uniform(key: Array, shape: tuple[int, ...], *, fan: int) -> Array:
    bound = math.sqrt(6.0 / fan)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
