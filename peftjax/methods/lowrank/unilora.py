"""Uni-LoRA: all low-rank factors of a model from one vector, by a fixed random choice of its numbers.

Paper: Li et al., "Uni-LoRA: One Vector is All You Need", 2025, arXiv 2506.00799.

    a_ij = θ_k / √n_k,  k = index_ij      the same for b; θ [size], n_k how often θ_k is chosen in the model
    y = x·W + (x·aᵀ)·b                    a [r, in], b [r, out]

Trained: θ, once, float32, uniform ±bound at first: the update is small and not zero, as both factors come
from θ. The indices are frozen, int32, as large as LoRA's factors; every number is chosen equally often, but
for one. Backward keeps x and x·aᵀ, and looks a and b up again. Defaults are those of the usual PyTorch
library.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import chosen, of_chosen
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.derived import Derived


@dataclass(frozen=True, kw_only=True)
class CountedTarget(Target):
    """A target whose factors' numbers are counted among those of the model.

    Attributes:
        before: how many come before its own.
        total: how many there are.
    """

    before: int
    total: int


@dataclass(frozen=True, kw_only=True)
class UniloraOptions(DropoutOptions, RankOptions):
    """Those of `unilora`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        size: of the vector θ.
        bound: what its numbers are at most at the start.
    """

    rank: int = 4
    size: int = 256
    bound: float = 0.02

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "size", self.size)
        positive(caller, "bound", self.bound)

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its place among all numbers."""
        found = super().find(caller, params, one_way=one_way, **ranks)
        counts = [math.prod(own.stack) * own.rank * sum(own.layout.matrix) for own in found]
        return [
            CountedTarget(**vars(own), before=sum(counts[:number]), total=sum(counts))
            for number, own in enumerate(found)
        ]


@register(
    kind="adapter",
    paper="Uni-LoRA, Li et al. 2025, arXiv 2506.00799",
    trains="one vector for all",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "size": 8, "bound": 1.0}, starts_as_base=False),
)
@takes(UniloraOptions)
def unilora(options: UniloraOptions) -> Transform:
    """Low-rank adaptation with all factors from one vector (arXiv 2506.00799).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """
    size = options.size

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        (first, *_) = targets
        assert isinstance(first, CountedTarget)
        counts = first.total // size + (jnp.arange(size) < first.total % size)
        scale = jnp.where(counts > 0, 1.0 / jnp.sqrt(jnp.maximum(counts, 1)), 0.0)
        theta = jax.random.uniform(key, (size,), minval=-options.bound, maxval=options.bound)
        return {"theta": theta}, {"scale": scale}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        assert isinstance(target, CountedTarget)
        (n, m), shape = target.layout.matrix, (*target.stack, target.rank)
        own = math.prod(shape) * (n + m)
        # Counted on over all targets, so that every number of θ is chosen equally often, but for one.
        index = (target.before % size + jax.random.permutation(key, own)) % size
        a, b = jnp.split(index.astype(jnp.int32), [math.prod(shape) * n])
        return {}, {"index_a": a.reshape(*shape, n), "index_b": b.reshape(*shape, m)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Derived:
        own = {name: slots[name] for name in ("index_a", "index_b")} | chosen(target)
        shared = {"theta": slots["theta"] * slots["scale"]}
        return Derived(base, own, shared, target.layout, _factors, 1.0, options.dropout, keys)

    return of_weights("unilora", options, start, weight, share=share, dropout=options.dropout)


def _factors(shared: Mapping[str, Array], slots: Mapping[str, Array]) -> tuple[Array, Array]:
    """The numbers of the vector at the indices of one matrix."""
    theta = shared["theta"]
    return theta[slots["index_a"]], of_chosen(theta[slots["index_b"]], slots)
