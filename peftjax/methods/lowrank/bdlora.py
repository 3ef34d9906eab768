"""BD-LoRA: LoRA with one block-diagonal factor, which tensor parallelism serves without moving numbers.

Paper: Wang et al., "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA
Serving", 2025, arXiv 2510.23346.

    y = x·W + s · (x·aᵀ)·b      a or b block-diagonal, of n blocks;  s = alpha / r

A weight that a mesh divides by its inputs (the output of attention, down) gets blocks of a, one that it
divides by its outputs (query, key, value, gate, up) blocks of b: of n parts, each multiplies its own.

Trained: r·(in / n + out) or r·(in + out / n) numbers a weight. Backward keeps x, and recomputes x·aᵀ. Start:
b = 0, a as in LoRA, its blocks ~ U(±√(6 n / in)).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.core.targets import pattern_value, require_patterns_used
from peftjax.methods._targets import Target
from peftjax.methods.lowrank._factors import ScaledTarget, start_uniform
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.low_rank import LowRank
from peftjax.weights.mapped import Mapped

Divided = Literal["inputs", "outputs", "none"]


@dataclass(frozen=True, kw_only=True)
class BdloraOptions(ScaleOptions):
    """Those of `lora` but `init`, and two more.

    Attributes:
        blocks: n; divides the rank and the divided side of each weight.
        side_pattern: by pattern, the side of a weight whose factor is block-diagonal; 'none' is LoRA's pair,
            and what matches no pattern is divided by its outputs.
    """

    blocks: int = 2
    side_pattern: Mapping[str, Divided] | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "blocks", self.blocks)
        for side in (self.side_pattern or {}).values():
            one_of(caller, "side_pattern", side, get_args(Divided))

    def side(self, target: Target) -> Divided:
        """The side of a target whose factor is block-diagonal."""
        return pattern_value(target.path, self.side_pattern, "outputs")


@register(
    kind="adapter",
    paper="BD-LoRA, Wang et al. 2025, arXiv 2510.23346",
    trains="r·(in + out / n) or r·(in / n + out)",
    backward_keeps="the input x (shared)",
    conformance=Conformance(
        example={
            "rank": 2,
            "alpha": 4.0,
            "blocks": 2,
            "side_pattern": {".*": "outputs"},
            "targets": "(?!.*(head|router)).*(kernel|embedding)",
        }
    ),
)
@takes(BdloraOptions)
def bdlora(options: BdloraOptions) -> Transform:
    """Low-rank adaptation with a block-diagonal factor (arXiv 2510.23346).

    Raises:
        PeftError: as `lora`; in `init`, for a pattern that matches no target, or blocks that do not divide a
            rank or the side of a weight.
    """
    count = options.blocks

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Any]:
        side, (n, m), rank = options.side(target), target.layout.matrix, target.rank
        a, b, _ = start_uniform(key, target, leaf)
        divided = {"inputs": (rank, n), "outputs": (rank, m), "none": ()}[side]
        if any(size % count for size in divided):
            raise PeftError(
                f"bdlora: {count} blocks do not divide rank {rank} and the {divided[1]} {side} of "
                f"{target.path!r}; choose others, or side_pattern={{{target.path!r}: 'none'}}"
            )
        if side == "inputs":
            bound = math.sqrt(6.0 * count / n)
            a = jax.random.uniform(key, (*target.stack, rank, n // count), minval=-bound, maxval=bound)
        elif side == "outputs":
            b = jnp.zeros((*target.stack, rank // count, m))
        return a, b, leaf

    def in_blocks(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> LowRank | Mapped:
        side = options.side(target)
        if side == "none":
            return weight
        factors = {"a": weight.a, "b": weight.b}
        product = BlockProduct(side, count, weight.scale)
        return Mapped(weight.base, factors, weight.layout, product, "beside", weight.dropout, weight.key)

    made = low_rank("bdlora", options, start, rslora=options.rslora, wrap=Wrap(in_blocks), one_way=True)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        frozen, trainable = made.init(key, params)
        require_patterns_used("bdlora", options.side_pattern, [target.path for target in frozen.plan])
        return frozen, trainable

    return replace(made, init=init)


@dataclass(frozen=True)
class BlockProduct:
    """`scale · (x·aᵀ)·b` with a `[r, n / count]` or b `[r / count, m]` in blocks."""

    side: Divided
    count: int
    scale: float

    def __call__(self, slots: Mapping[str, Array], x: Array) -> Array:
        """The product of x `[..., n]`."""
        a, b = (slots[name].astype(x.dtype) for name in ("a", "b"))
        if self.side == "inputs":
            blocks = a.reshape(self.count, -1, a.shape[-1])
            parts = x.reshape(*x.shape[:-1], self.count, -1)
            z = jnp.einsum("...bi,bri->...br", parts, blocks).reshape(*x.shape[:-1], -1)
            return self.scale * (z @ b)
        parts = (x @ a.T).reshape(*x.shape[:-1], self.count, -1)
        blocks = b.reshape(b.shape[0], self.count, -1)
        return self.scale * jnp.einsum("...br,rbo->...bo", parts, blocks).reshape(*x.shape[:-1], -1)
