"""ROAST: the factors of all LoRA adapters, drawn by a hash from one trained vector.

Papers: Desai et al., "Efficient Model Compression with Random Operation Access Specific Tile (ROAST)
Hashing", 2022, arXiv 2207.10702; Desai and Shrivastava, "In Defense of Parameter Sharing for
Model-Compression" (STABLE-RPS), ICLR 2024, arXiv 2310.11611.

    a, b [j] = λ · G_j · M[h(j)]      M [m] for the model, G_j = ±1, λ a number for each array
    y = x·W + s · ((x·aᵀ)·b - (x·a₀ᵀ)·b₀)      s = alpha / r, and a₀, b₀ those of M as it starts

h(j) of an entry j of n: 'cyclic' (STABLE-RPS) hash(⌊j/m⌋) + j, 'tiles' (ROAST) hash(⌊j/tile⌋) + j mod tile,
'hashed' (HashedNets) hash(j), all modulo m. Trained: m = density · n numbers, M ~ U(±bound) at first, λ such
that a ~ U(±1/√in), b ~ U(±1/√r). Backward keeps what LoRA's does, and the factors. `stable` divides the
gradient of M_i by (Σλ)²/n_i over its n_i entries: a step of SGD moves them by the mean of their own steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.checks import one_of, positive, positive_share
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions
from peftjax.methods._targets import Target, all_layers
from peftjax.methods._weights import SHARED, Slots, of_weights
from peftjax.methods.structured._options import ScaledOptions
from peftjax.transform.around import KEEP, Around, Own, require_given
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank

Place = Literal["cyclic", "tiles", "hashed"]
_LARGEST = 2**32 - 1
_SIGNS, _PLACES = 0x9E3779B9, 0x85EBCA6B


@dataclass(frozen=True, kw_only=True)
class HashedTarget(Target):
    """A target whose first entry has this number among those of all factors."""

    offset: int


@dataclass(frozen=True, kw_only=True)
class RoastOptions(DropoutOptions, ScaledOptions):
    """Those of `roast`.

    Attributes:
        density: m as a share of the numbers of all factors, at most 1.
        mapping: which entry of the vector is whose; see above.
        tile: of 'tiles', how many entries in a row come from neighbors.
        bound: the vector starts between -bound and bound.
        stable: divide the vector's gradient as above; with an optimizer that divides by its size, such as
            Adam, that has no effect.
        seed: of the hash.
    """

    density: float = 0.1
    mapping: Place = "cyclic"
    tile: int = 256
    bound: float = 0.04
    stable: bool = True
    seed: int = 0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive_share(caller, "density", self.density)
        one_of(caller, "mapping", self.mapping, get_args(Place))
        positive(caller, "tile", self.tile)
        positive(caller, "bound", self.bound)

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with the number of its first entry.

        Raises:
            PeftError: as `find_targets`, or when there are more entries than 32 bits count.
        """
        found: list[Target] = []
        offset = 0
        for target in super().find(caller, params, one_way=one_way, **ranks):
            found.append(HashedTarget(**vars(target), offset=offset))
            offset += _count(target)
        if offset > _LARGEST:
            raise PeftError(
                f"{caller}: {offset} entries of factors are too many; lower rank or take fewer targets"
            )
        return found


@register(
    kind="adapter",
    paper="ROAST and STABLE-RPS, Desai et al. 2022 and 2024, arXiv 2207.10702, 2310.11611",
    trains="density · r·(in + out)",
    backward_keeps="the input x (shared) and x·aᵀ",
    conformance=Conformance(example={"rank": 2, "alpha": 4.0, "density": 0.4, "bound": 1.0}),
)
@takes(RoastOptions)
def roast(options: RoastOptions) -> Transform:
    """Low-rank adapters whose numbers all come from one vector (arXiv 2207.10702, 2310.11611).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or tiles longer than the vector.
    """

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        size = max(1, round(options.density * sum(map(_count, targets))))
        if options.mapping == "tiles" and options.tile > size:
            raise PeftError(
                f"roast: tiles of {options.tile} are longer than the vector of {size} numbers; lower tile or "
                "raise density"
            )
        vector = jax.random.uniform(key, (size,), minval=-options.bound, maxval=options.bound)
        return {"vector": vector}, {"first": vector, "usage": _usage(targets, size, options)}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        scale, layout = options.scale_of(target), target.layout
        a, b = (all_layers(f, target) for f in factors(slots["vector"], target, options))
        first_a, first_b = (all_layers(f, target) for f in factors(slots["first"], target, options))
        base = LowRank(base, first_a, first_b, layout, -scale)
        return LowRank(base, a, b, layout, scale, options.dropout if keys is not None else 0.0, keys)

    around = Around(gradients=_stabilized()) if options.stable else Around(gradients=KEEP)
    return of_weights(
        "roast", options, lambda key, target, base: ({}, {}), weight,
        share=share, dropout=options.dropout, one_way=True, around=around,
    )  # fmt: skip


def factors(vector: Array, target: Target, options: RoastOptions) -> tuple[Array, Array]:
    """`a [*stack, r, in]` and `b [*stack, r, out]` of the target."""

    @jax.checkpoint  # backward computes places and signs again
    def drawn(vector: Array) -> list[Array]:
        made = []
        for shape, offset, size in _arrays(target, options):
            places, signs = _hashed(offset, math.prod(shape), len(vector), options)
            made.append(size * (signs * vector[places]).reshape(shape))
        return made

    a, b = drawn(vector)
    return a, b


def _arrays(target: Target, options: RoastOptions) -> list[tuple[tuple[int, ...], int, float]]:
    """Of both factors, the shape, the number of the first entry and λ."""
    assert isinstance(target, HashedTarget)
    (n, m), r = target.layout.matrix, target.rank
    of_a, of_b = (*target.stack, r, n), (*target.stack, r, m)
    return [
        (of_a, target.offset, 1.0 / (math.sqrt(n) * options.bound)),
        (of_b, target.offset + math.prod(of_a), 1.0 / (math.sqrt(r) * options.bound)),
    ]


def _count(target: Target) -> int:
    return math.prod(target.stack) * target.rank * sum(target.layout.matrix)


def _hashed(offset: int, count: int, size: int, options: RoastOptions) -> tuple[Array, Array]:
    """Where the entries with these numbers lie in the vector, and their signs; nothing of it is stored."""
    number = jnp.uint32(offset) + jnp.arange(count, dtype=jnp.uint32)
    signs = 1.0 - 2.0 * (mixed(number, options.seed ^ _SIGNS) & 1).astype(jnp.float32)
    length = {"cyclic": size, "tiles": options.tile, "hashed": 1}[options.mapping]
    chunk, within = number // jnp.uint32(length), number % jnp.uint32(length)
    starts = mixed(chunk, options.seed ^ _PLACES)
    if options.mapping == "tiles":
        return starts % jnp.uint32(size - length + 1) + within, signs
    start = starts % jnp.uint32(size)
    rest = jnp.uint32(size) - start  # without a sum of more than 32 bits
    return jnp.where(within < rest, start + within, within - rest), signs


def mixed(x: Array, seed: int) -> Array:
    """A hash of whole numbers, uint32: MurmurHash3's finalizer of the sum with the seed."""
    x = x + jnp.uint32(seed & _LARGEST)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _usage(targets: Sequence[Target], size: int, options: RoastOptions) -> Array:
    """`(Σλ)² / n_i` of each entry of the vector, over the n_i entries of factors that are drawn from it."""

    @jax.jit
    def used() -> Array:
        counts, sizes = jnp.zeros(size), jnp.zeros(size)
        for target in targets:
            for shape, offset, own in _arrays(target, options):
                places, _ = _hashed(offset, math.prod(shape), size, options)
                counts, sizes = counts.at[places].add(1.0), sizes.at[places].add(own)
        return jnp.square(sizes) / (counts + 1e-3)

    return used()


def _stabilized() -> optax.GradientTransformationExtraArgs:
    def update(
        updates: Own, state: Any, params: Any = None, *, frozen: Any = None, **extra: Any
    ) -> tuple[Own, Any]:
        usage = require_given("roast", params, frozen).state[SHARED]["usage"]
        own = updates[SHARED]
        return {**updates, SHARED: {**own, "vector": own["vector"] / (usage + 1e-6)}}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
