"""TinyLoRA: a few numbers, shared by groups of weights, between the first singular directions of each.

Paper: "Learning to Reason in 13 Parameters", 2026, arXiv 2602.04118.

    W ≈ aᵀ·b     the first r singular directions, a [r, in], b [r, out], √ of the values in both, frozen
    y = x·W + (x·aᵀ)·Rᵀ·b      R = Σ_i v_i P_i [r, r], P [u, r, r] random, frozen, v [u] of the weight's group

Trained: v, u numbers a group, float32, zero at first. With `tying` 0 each matrix is a group of its own, with
1 all are one. Backward keeps x·aᵀ, r numbers a token, and not x. P ~ N(0, 1/r). Defaults are those of the
usual PyTorch library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core import naming
from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.lowrank._base import base_matrices, principal
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class GroupedTarget(Target):
    """A target each of whose matrices belongs to a group.

    Attributes:
        groups: of its matrices, one after the other.
        count: of all groups.
    """

    groups: tuple[int, ...]
    count: int


@dataclass(frozen=True, kw_only=True)
class TinyloraOptions(DropoutOptions, RankOptions):
    """Those of `tinylora`.

    Attributes:
        rank: r; at most the smaller side of each weight.
        size: u, the numbers of a group.
        tying: how much is shared: 0 nothing, 1 one vector by all weights.
    """

    rank: int = 2
    size: int = 64
    tying: float = 0.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "size", self.size)
        if not 0.0 <= self.tying <= 1.0:
            raise PeftError(f"{caller}: tying must be from 0 to 1, got {self.tying}")

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its groups: neighbors in the order of the layers."""
        found = super().find(caller, params, one_way=one_way, **ranks)
        matrices = []
        for number, own in enumerate(found):
            layer = naming.layer_index(own.path, self.layers_pattern)
            for place, index in enumerate(np.ndindex(*own.stack)):
                at = layer if layer is not None else index[0] if index else -1
                matrices.append((at, number, place))
        groups = [[0] * int(np.prod(own.stack)) for own in found]
        count = group_count(len(matrices), self.tying)
        for position, (_, number, place) in enumerate(sorted(matrices)):
            groups[number][place] = group_of(position, len(matrices), count)
        return [
            GroupedTarget(**vars(own), groups=tuple(own_groups), count=count)
            for own, own_groups in zip(found, groups)
        ]


def group_count(matrices: int, tying: float) -> int:
    """How many groups so many matrices are."""
    return max(1, round(matrices * (1.0 - tying)))


def group_of(position: int, matrices: int, count: int) -> int:
    """The group of the matrix at a position; the last one takes what is left over."""
    return min(position // max(1, matrices // count), count - 1)


@register(
    kind="adapter",
    paper="TinyLoRA, 2026, arXiv 2602.04118",
    trains="u, or less",
    backward_keeps="x·aᵀ",
    conformance=Conformance(example={"rank": 2, "size": 3}),
)
@takes(TinyloraOptions)
def tinylora(options: TinyloraOptions) -> Transform:
    """Train a few shared numbers between the first singular directions (arXiv 2602.04118).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        (first, *_) = targets
        assert isinstance(first, GroupedTarget)
        return {"v": jnp.zeros((first.count, options.size))}, {}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        assert isinstance(target, GroupedTarget)
        rank = target.rank
        svd = principal(base_matrices(target, base), rank)
        root = jnp.sqrt(svd.sizes)[..., None]
        p = jax.random.normal(key, (*target.stack, options.size, rank, rank)) / jnp.sqrt(rank)
        groups = jnp.asarray(target.groups, jnp.int32).reshape(target.stack)
        return {}, {"a": root * svd.u.swapaxes(-1, -2), "b": root * svd.vt, "p": p, "group": groups}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> LowRank:
        turn = jnp.einsum("...u,...uij->...ji", slots["v"][slots["group"]], slots["p"])
        dropout = options.dropout if keys is not None else 0.0
        return LowRank(base, slots["a"], turn @ slots["b"], target.layout, 1.0, dropout, keys)

    return of_weights("tinylora", options, start, weight, share=share, dropout=options.dropout, one_way=True)
