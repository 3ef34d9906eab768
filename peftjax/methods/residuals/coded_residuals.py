"""Residuals of 4 bits: the blocks of a backbone keep codes for their backward pass, whatever is trained.

The activation half of S2A: Jin et al. 2025, arXiv 2503.08154, which keeps activations of non-parametric
operations in 4 bits, by way of their derivatives. No code and no details are published; what follows is ours.

    forward   as it is, bit for bit
    backward  activation  4-bit codes of its derivative on a fixed grid; of ReLU one bit, exact
              gated       8-bit codes of both inputs, of which everything is recomputed
              norm        4-bit codes of the normalized x̂, and 1/σ in float32
              attention   4-bit codes of q, k and v; its weights are recomputed, by blocks of rows
              linear      frozen: nothing. Trained or adapted: 8-bit codes of its input, one for q, k and v;
                          of a norm's result only the four bits that its own codes lack

It trains nothing and goes beside a method: `pj.chain(pj.coded_residuals(), pj.lora())`.
"""

import dataclasses

from jax import Array

from peftjax.backbone.backbone import Backbone
from peftjax.backbone.rewriting import rewrite_stacks
from peftjax.ops.coded.bits import Bits
from peftjax.quantize.affine import GROUP
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.registry import register
from peftjax.transform.transform import Forward, Transform


@register(
    kind="companion",
    paper="4-bit residuals after S2A, Jin et al. 2025, arXiv 2503.08154",
    trains="nothing",
    backward_keeps="codes of 4 or 8 bits instead of what a block keeps",
    of_blocks=True,
)
def coded_residuals(
    *,
    activation: int = 4,
    gated: int = 8,
    norm: int = 4,
    attention: int = 4,
    inputs: int = 8,
    group: int = GROUP,
) -> Transform:
    """The blocks keep codes for their backward pass (after S2A, arXiv 2503.08154).

    Args:
        activation: bits of an activation: 4, 8 or 32, which keeps the compute dtype as it is.
        gated: of each of the two inputs of a gated one.
        norm: of the normalized values.
        attention: of query, key and value.
        inputs: of what enters a linear layer that is trained or adapted.
        group: values along the features that share a range; a shard of the features best holds whole groups.

    Raises:
        PeftError: for other numbers; in `model`, when it is not a backbone of peftjax.
    """
    bits = Bits(activation, gated, norm, attention, inputs, group)

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        return Frozen(params), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return frozen.params

    def model(forward: Forward) -> Forward:
        return with_codes("coded_residuals", forward, bits)

    return Transform("coded_residuals", {}, init, apply, model)


def with_codes(method: str, forward: Forward, bits: Bits) -> Backbone:
    """The backbone whose blocks, and its encoder's, keep residuals in so many bits.

    Raises:
        PeftError: it is not a backbone.
    """

    def rewrite(backbone: Backbone) -> Backbone:
        block = backbone.block
        config = dataclasses.replace(block.config, residuals=bits)
        return dataclasses.replace(backbone, block=block.clone(config=config))

    return rewrite_stacks(method, forward, rewrite)
