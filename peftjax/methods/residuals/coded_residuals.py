"""Residuals of 4 bits: the blocks of a backbone keep codes for their backward pass, whatever is trained.

The activation half of S2A: Jin et al. 2025, arXiv 2503.08154, which keeps activations of non-parametric
operations in 4 bits, by way of their derivatives. No code and no details are published; what follows is ours.

    forward   as it is, bit for bit
    backward  activation  4-bit codes of its derivative on a fixed grid; of ReLU one bit, exact
              gated       8-bit codes of both inputs, of which everything is made again
              norm        4-bit codes of the normalized x̂, and 1/σ in float32
              attention   4-bit codes of q, k and v; its weights are made again, by blocks of rows
              linear      frozen: nothing. Trained or adapted: 8-bit codes of its input, one for q, k and v;
                          of a norm's result only the four bits that its own codes lack

It trains nothing and goes beside a method: `pj.chain(pj.coded_residuals(), pj.lora())`. What the gradient of
a weight needs is read off the program, so any method of weights, plain or structured, may stand there.

Kept per token and block, in bits. D, q, k and F are the widths of stream, queries, keys and inner layer. A
group of 64 values has 32 bits more: 4 bits are 4.5 on average, and 8 are 8.5.

    frozen linear layers     9 D + 64 + 4.5 (q + 2 k) + 4 F          gated: 17 F in the place of 4 F
    LoRA on q and v          + 4 D                                   post-norm: + 8.5 D
    LoRA on every layer      + 8 D + 8.5 (q + F)                     post-norm: + 17 D in the place of 8 D;
                                                                     gated: no 8.5 F

Trained scales of norms add 4 bits a value where no linear layer after them has added those. Norms after a
branch (sandwich) and of q and k keep 4.5 bits a value. With `activation=8` an activation keeps 8.5 F, and the
layer after it nothing: less than 12.5 F where that one is trained. Nothing is made again but attention, so
`remat` beside it would only cost time.

Measured on 12 blocks of width 128, the cosine of the whole gradient with the exact one is above 0.999. That
of the queries' and keys' own gradients is about 0.99; `attention=8`, 4 (q + 2 k) bits more, brings it above
0.999 too.
"""

import dataclasses
from typing import Any

from jax import Array

from peftjax.backbone.rewriting import rewrite_stacks
from peftjax.kernels.packed_residuals import GROUP
from peftjax.ops.coded.bits import Bits
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


def with_codes(who: str, forward: Forward, bits: Bits) -> Forward:
    """The backbone whose blocks, and its encoder's, keep residuals in so many bits.

    Raises:
        PeftError: it is not a backbone.
    """

    def rewrite(backbone: Any) -> Any:
        block = backbone.block
        config = dataclasses.replace(block.config, residuals=bits)
        return dataclasses.replace(backbone, block=block.clone(config=config))

    return rewrite_stacks(who, forward, rewrite)
