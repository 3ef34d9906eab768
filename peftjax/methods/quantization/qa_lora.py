"""QA-LoRA: an adapter that the zero points of a quantized base can hold.

Paper: Xu et al., "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", ICLR 2024, arXiv
2309.14717.

    W = scale_g · (code - zero_g)        y = x·W + s · (pool(x)·aᵀ)·b        a [r, groups], b [r, out]

pool(x) sums x over each group of inputs that shares a scale, so that the adapter adds one number to all
weights of a group and output:

    W + s·aᵀb = scale_g · (code - zero'_g)        zero'_g = zero_g - s·(aᵀb)_g / scale_g

exactly: the codes stay as they are, and the merged model is as small and as fast as the base (`into_zeros`).

Trained: a and b, r·(groups + out) numbers a weight. Backward keeps pool(x), in / group numbers a token, and
r more. The paper takes groups of 32 inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods._targets import Target
from peftjax.methods.lowrank._factors import ScaledTarget, plain_matrices
from peftjax.methods.lowrank._options import ScaleOptions
from peftjax.methods.lowrank.lora import Wrap, low_rank
from peftjax.methods.quantization.quantized import CodeOptions
from peftjax.quantize.codes import decode
from peftjax.transform.frozen import Params
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.coding import coded_weight
from peftjax.weights.low_rank import LowRank
from peftjax.weights.pooled_low_rank import PooledLowRank
from peftjax.weights.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class QaLoraOptions(ScaleOptions, CodeOptions):
    """Those of `lora` but `init`, and of `quantized`, of whole numbers alone.

    Attributes:
        affine: whether a group has a zero point, which it must have.
        group: how many weights along the inputs share a scale and a number of the adapter.
    """

    affine: bool = True
    group: int | None = 32

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        ScaleOptions.require_valid(self, caller)
        CodeOptions.require_valid(self, caller)
        if not self.affine:
            raise PeftError(f"{caller}: without zero points nothing can hold the adapter; set affine=True")
        if self.dropout > 0.0:
            raise PeftError(f"{caller}: it has no dropout; set dropout=0")


@register(
    kind="adapter",
    paper="QA-LoRA, Xu et al. 2023, arXiv 2309.14717",
    trains="r·(in / group + out)",
    backward_keeps="pool(x), in / group numbers a token, and pool(x)·aᵀ",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(
        example={"rank": 2, "alpha": 4.0, "format": "int4", "group": 4}, starts_as_base=False
    ),
)
@takes(QaLoraOptions)
def qa_lora(options: QaLoraOptions) -> Transform:
    """Low-rank adaptation that merges into the zero points of a quantized base (arXiv 2309.14717).

    Raises:
        PeftError: as `lora`; here for an option out of range, a format without zero points or dropout; in
            `init`, when a base is not a plain array.

    Examples:
        >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
        >>> frozen, trainable = pj.qa_lora(rank=2).init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, trainable)
        {'up/kernel': {'a': (2, 2), 'b': (2, 8)}}
    """

    def start(key: Array, target: ScaledTarget, leaf: Any) -> tuple[Array, Array, Quantized]:
        plain_matrices("qa_lora", target, leaf)
        base = coded_weight(leaf, target.layout, options.form, rows="o")
        n, m = target.layout.matrix
        shape = (*target.stack, target.rank, base.codes.scales.shape[-1])
        bound = 1.0 / math.sqrt(n)  # the sums have group times the variance of x, and are group times fewer
        a = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        return a, jnp.zeros((*target.stack, target.rank, m)), base

    def pooled(target: Target, weight: LowRank, slots: Mapping[str, Array]) -> Weight:
        group = weight.base.codes.group
        return PooledLowRank(weight.base, weight.a, weight.b, weight.layout, weight.scale, group)

    wrap = Wrap(pooled)
    return low_rank("qa_lora", options, start, rslora=options.rslora, wrap=wrap)


def into_zeros(params: Params) -> Params:
    """Parameters as `apply` gives them, each adapter of `qa_lora` in the zero points of its codes.

    The weights are `Quantized`, with the codes and scales of the base and float32 zero points, and what they
    decode to is what `merge` gives, up to rounding.

    Examples:
        >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
        >>> method = pj.qa_lora(rank=2)
        >>> merged = into_zeros(method.apply(*method.init(jax.random.key(0), params)))
        >>> merged["up"]["kernel"].codes.zeros.shape
        (8, 2)
    """
    return tree.map_named(
        lambda _, leaf: _with_zeros(leaf) if isinstance(leaf, PooledLowRank) else leaf, params
    )


def _with_zeros(w: PooledLowRank) -> Quantized:
    codes = w.base.codes
    scales = decode(codes.scales).astype(jnp.float32)
    added = w.scale * jnp.einsum("...rg,...ro->...og", w.a, w.b)
    # A group of zeros has the scale 0 and codes that are its zero point: of scale 1 it is zeros too.
    scales = jnp.where(scales > 0, scales, 1)
    zeros = codes.zeros.astype(jnp.float32) - added / scales
    return replace(w.base, codes=replace(codes, scales=scales, zeros=zeros))
