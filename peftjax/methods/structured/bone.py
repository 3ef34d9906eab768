"""Bone: each block of a weight, times a small matrix and plus that matrix.

Paper: Kang and Yin, "Bone: Block-Affine Adaptation of Large Language Models", 2024, arXiv 2409.15371, of
which the later versions are MiSS.

    W'_gh = W_gh + M_h·W_gh + M_h      W_gh the block r x r of group g of the inputs and h of the outputs

Trained: M [out/r, r, r], float32, zero at first: r·out numbers a weight. The update has no thin form: each
layer forms it. Backward keeps x, M and W.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added


@dataclass(frozen=True, kw_only=True)
class BoneOptions(RankOptions):
    """Those of `bone`.

    Attributes:
        rank: r, the size of a block; it divides the inputs and the outputs of each weight.
    """

    rank: int = 64


@register(
    kind="adapter",
    paper="Bone, Kang and Yin 2024, arXiv 2409.15371",
    trains="r·out",
    backward_keeps="the input x (shared)",
    conformance=Conformance(
        example={"rank": 2, "targets": r"(?!.*(head|classifier|router|conv_1)/).*kernel"}
    ),
)
@takes(BoneOptions)
def bone(options: BoneOptions) -> Transform:
    """Multiply each block of the targeted weights by a small matrix, and add it (arXiv 2409.15371).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        (n, m), rank = target.layout.matrix, target.rank
        if n % rank or m % rank:
            raise PeftError(
                f"bone: blocks of {rank} do not divide {target.path!r}, a matrix of {n} x {m}; choose "
                "another rank or exclude it"
            )
        return {"block": jnp.zeros((*target.stack, m // rank, rank, rank))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        return Added(base, slots, target.layout, _change, True)

    return of_weights("bone", options, start, weight, one_way=True)


def _change(slots: Mapping[str, Array], base: Array) -> Array:
    block = slots["block"]
    rank = block.shape[-1]
    w = base.reshape(base.shape[0] // rank, rank, -1, rank)
    change = jnp.einsum("hab,gbhc->gahc", block, w) + block.swapaxes(0, 1)
    return change.reshape(base.shape)
