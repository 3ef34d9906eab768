"""MoS: low-rank factors put together from shards of shared pools, by a fixed random choice.

Paper: Wang et al., "MoS: Unleashing Parameter Efficiency of LoRA with Mixture of Shards", ICLR 2025, arXiv
2410.00938.

    P_a [L·e·l, in/l], P_b [L·e·l, out/l]       one pair of pools for the L matrices of one name and shape
    a [r, in], b [r, out]: each row is l shards of its pool       y = x·W + alpha/r · (x·aᵀ)·b

Of each pool the last L·p·l shards are private, p·l for each matrix; each matrix takes its own, and (r - p)·l
distinct others at random, for a and b apart. Trained: the pools, e·(in + out) numbers a weight as in LoRA of
rank e, for factors of rank r. Backward keeps x and x·aᵀ, and forms a and b again. Start: P_a ~ U(±1/√in),
P_b = 0. The default sizes are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._pools import PooledTarget, in_pools, numbered, of_pool, pooled
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import chosen, of_chosen
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.derived import Derived


@dataclass(frozen=True, kw_only=True)
class MosOptions(DropoutOptions, RankOptions):
    """Those of `mos`.

    Attributes:
        rank: r of the factors; at most the smaller side of each weight.
        stored: e, the rank of the LoRA with as many trained numbers.
        shards: l, how many a row is made of; it divides the inputs and outputs of each weight.
        private: p, how many rows' worth of shards each matrix has for itself.
        alpha: numerator of the scale.
    """

    rank: int = 8
    stored: int = 2
    shards: int = 4
    private: int = 1
    alpha: float = 16.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        for name in ("stored", "shards", "alpha"):
            positive(caller, name, getattr(self, name))
        at_least(caller, "private", self.private, 0)
        if self.private > min(self.stored, self.rank):
            raise PeftError(f"{caller}: private {self.private} is more than stored {self.stored} or the rank")

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its pools; raises as `find_targets`, and for shards."""
        found = pooled(
            super().find(caller, params, one_way=one_way, **ranks), layers_pattern=self.layers_pattern
        )
        for own in found:
            n, m = own.layout.matrix
            if n % self.shards or m % self.shards:
                raise PeftError(
                    f"{caller}: {self.shards} shards do not divide both sides of {own.path!r}, a matrix of "
                    f"{n} x {m}; choose another number or exclude it"
                )
            public = (self.stored - self.private) * own.sharing
            if own.rank < self.private or own.rank - self.private > public:
                raise PeftError(
                    f"{caller}: {own.path!r} has rank {own.rank} with {self.private} private, and its "
                    f"{own.sharing} matrices share {public} others; lower the rank, or raise stored"
                )
        return [*found]


@register(
    kind="adapter",
    paper="MoS, Wang et al. 2025, arXiv 2410.00938",
    trains="e·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(
        example={"rank": 2, "stored": 2, "shards": 1, "alpha": 4.0, "targets": ".*kernel"}
    ),
)
@takes(MosOptions)
def mos(options: MosOptions) -> Transform:
    """Low-rank adaptation with factors from shared pools of shards (arXiv 2410.00938).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or shards that do not fit the
            parameters.
    """
    shards, private = options.shards, options.private

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        pools: Slots = {}
        for pool, (target, *_) in in_pools(targets).items():
            (n, m), rows = target.layout.matrix, target.sharing * options.stored * shards
            own, bound = jax.random.fold_in(key, pool), 1.0 / math.sqrt(n)
            a = jax.random.uniform(own, (rows, n // shards), minval=-bound, maxval=bound)
            pools |= numbered({"a": a, "b": jnp.zeros((rows, m // shards))}, pool)
        return pools, {}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        assert isinstance(target, PooledTarget)
        count, public = target.count, (options.stored - private) * target.sharing * shards
        drawn = (target.rank - private) * shards
        own = public + private * shards * (target.first + jnp.arange(count))[:, None]
        kept = own + jnp.arange(private * shards)
        places = {}

        def distinct(key: Array) -> Array:
            return jax.random.permutation(key, public)[:drawn]

        for name, side in zip(("places_a", "places_b"), jax.random.split(key)):
            others = jax.vmap(distinct)(jax.random.split(side, count))
            rows = jnp.concatenate([others, kept], axis=-1).astype(jnp.int32)
            places[name] = rows.reshape(*target.stack, target.rank * shards)
        return {}, places

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Derived:
        own = {name: slots[name] for name in ("places_a", "places_b")} | chosen(target)
        scale, factors = options.alpha / target.rank, Shards(target.rank)
        return Derived(
            base, own, of_pool(slots, target), target.layout, factors, scale, options.dropout, keys
        )

    return of_weights("mos", options, start, weight, share=share, dropout=options.dropout)


@dataclass(frozen=True)
class Shards:
    """The factors of one matrix, of so many rows."""

    rank: int

    def __call__(self, pools: Mapping[str, Array], slots: Mapping[str, Array]) -> tuple[Array, Array]:
        """The shards of each row, one after the other."""
        a, b = (pools[side][slots[f"places_{side}"]].reshape(self.rank, -1) for side in ("a", "b"))
        return a, of_chosen(b, slots)
