"""PHM: change each weight by a sum of Kronecker products, their small factors shared by the model.

Papers: Zhang et al., "Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex
Multiplications with 1/n Parameters", ICLR 2021, arXiv 2102.08597; convolutions, Grassucci et al., 2022, arXiv
2110.04176; the shared and thin factors, Mahabadi et al., "Compacter", NeurIPS 2021, arXiv 2106.04647.

    W' = W + Σ_i A_i ⊗ S_i      i = 1 ... n, A_i [n, n], S_i [in/n, out/n], or S_i = s_i·t_i of the rank ρ

Of a convolution the products are over its channels: S_i [window, in/n, out/n]. Trained: A, n³ numbers for the
model, or a weight with `share=False`; ρ·(in + out) a weight, or in·out/n with `rank=None`. Backward keeps x,
which the layer shares; x·W' is taken block by block, and for convolutions the change is formed in the layer.
A is uniform, ±√3/n, s Glorot's, and t or S zero, so that the model is as it was. Weight decay on A shrinks
all of the model's changes: leave it off. Defaults: Compacter's n = 4 and ρ = 1.
"""

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
from peftjax.methods.structured._kronecker import (
    LEFT,
    RIGHT,
    RULE,
    WHOLE,
    Applied,
    Formed,
    blocks_of,
    drawn,
)
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added
from peftjax.weights.base import Weight
from peftjax.weights.mapped import Mapped


@dataclass(frozen=True, kw_only=True)
class PhmOptions(DropoutOptions):
    """Those of `phm`.

    Attributes:
        order: n, which divides the inputs and outputs, or channels, of each weight.
        rank: ρ of each S; None for whole ones.
        share: whether all weights have the same A.
    """

    order: int = 4
    rank: int | None = 1
    share: bool = True

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "order", self.order)
        positive(caller, "rank", self.rank)


@register(
    kind="adapter",
    paper="PHM and Compacter, Zhang et al. 2021, Mahabadi et al. 2021, arXiv 2102.08597, 2106.04647",
    trains="ρ·(in + out), and n³ in all",
    backward_keeps="the input x (shared)",
    conformance=Conformance(
        example={"order": 2, "targets": r"(.*/)?(up|down|conv_2|query|value|out)/kernel"}
    ),
)
@takes(PhmOptions)
def phm(options: PhmOptions) -> Transform:
    """Add a sum of Kronecker products to the targeted weights (arXiv 2102.08597, 2110.04176, 2106.04647).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters, or
            whose sides the order does not divide.
    """
    n, rank = options.order, options.rank

    def rule(key: Array, stack: tuple[int, ...] = ()) -> Array:
        return drawn(key, (*stack, n, n, n), 2 * n * n)

    def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
        return {RULE: rule(key)}, {}

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        rows, stack = blocks_of("phm", target, n).rows, target.stack
        columns = target.layout.matrix[1] // n
        keys = jax.random.split(key)
        own = {} if options.share else {RULE: rule(keys[0], stack)}
        if rank is None:
            return {**own, WHOLE: jnp.zeros((*stack, n, rows, columns))}, {}
        left = drawn(keys[1], (*stack, n, rows, rank), rows + rank)
        return {**own, LEFT: left, RIGHT: jnp.zeros((*stack, n, rank, columns))}, {}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Weight:
        blocks, layout, dropout = blocks_of("phm", target, n), target.layout, options.dropout
        if options.share:
            slots = {**slots, RULE: jnp.broadcast_to(slots[RULE], (*layout.stack, n, n, n))}
        if blocks.window > 1:
            return Added(base, slots, layout, Formed(blocks), False, dropout, keys)
        return Mapped(base, slots, layout, Applied(blocks), "beside", dropout, keys)

    return of_weights(
        "phm",
        options,
        start,
        weight,
        share=share if options.share else None,
        dropout=options.dropout,
        one_way=True,
    )
