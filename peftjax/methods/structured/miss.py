"""MiSS (Bone): one small matrix, added to every group of rows of a weight.

Paper: Kang and Yin, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing", 2024,
arXiv 2409.15371 (first called Bone, block affine).

    y = x·W + (Σ_g x_g)·M       x cut into groups x_g of r inputs (the last one may be shorter), M [r, out]
                                with `width`, M = [D, D, ...], D [r, width] repeated over the outputs

Trained: M, float32, zero at first: r·out numbers a weight, or r·width. Backward keeps x, which the layer
shares with its neighbors, and sums its groups again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class MissOptions(DropoutOptions, RankOptions):
    """Those of `miss`.

    Attributes:
        rank: r, the number of inputs in a group; at most the smaller side of each weight.
        width: of a matrix that is repeated over the outputs, which it must divide; by default all outputs.
    """

    rank: int = 64
    width: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        if self.width is not None:
            positive(caller, "width", self.width)


@register(
    kind="adapter",
    paper="MiSS, Kang and Yin 2024, arXiv 2409.15371",
    trains="r·out",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"rank": 3}),
)
@takes(MissOptions)
def miss(options: MissOptions) -> Transform:
    """Add one matrix to every group of r inputs of the targeted weights (arXiv 2409.15371).

    Raises:
        PeftError: here for an option out of range; in `init` for targets, ranks or widths that do not fit the
            parameters.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        outputs = target.layout.matrix[1]
        width = options.width or outputs
        if outputs % width:
            raise PeftError(
                f"miss: width {width} does not divide the {outputs} outputs of {target.path!r}; choose "
                "another or exclude it"
            )
        return {"block": jnp.zeros((*target.stack, target.rank, width))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Mapped:
        outputs = Outputs(target.layout.matrix[1])
        return Mapped(base, slots, target.layout, outputs, "beside", options.dropout, keys)

    return of_weights("miss", options, start, weight, one_way=True, dropout=options.dropout)


@dataclass(frozen=True)
class Outputs:
    """The map to so many outputs."""

    count: int

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """The sum over the groups of x, times the block, repeated."""
        block = slots["block"].astype(x.dtype)
        rank, width = block.shape
        missing = -x.shape[-1] % rank
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        summed = x.reshape(*x.shape[:-1], -1, rank).sum(axis=-2)
        return jnp.tile(summed @ block, self.count // width)
