"""What differs between the transformer blocks of the families, and the norm that it chooses."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from peftjax.backbone.layers import RMSNorm, layer_norm
from peftjax.backbone.rounding import Rounding
from peftjax.core.errors import PeftError
from peftjax.ops.coded.bits import Bits

AttentionKind = Literal["rows", "flash"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Experts in place of one feed-forward.

    Attributes:
        count: E.
        chosen: k, how many each token has.
        normalized: whether coefficients are the softmax of the chosen logits, and not of all.
        router_bias: whether the router has a bias.
        bound: c of the gated activation `f(min(gate, c)) (1 + clip(up, -c, c))`; None is `f(gate) up`.
    """

    count: int
    chosen: int
    normalized: bool = True
    router_bias: bool = False
    bound: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What differs between the blocks of the families.

    Attributes:
        width: D of the residual stream.
        num_heads: N query heads.
        num_kv_heads: K heads of keys and values, a divisor of N; default N.
        head_dim: H; default D / N.
        inner_size: F of the feed-forward; of each expert, where there are some.
        experts: those that take its place.
        activation: a name in `ACTIVATIONS`.
        gated: `(f(x W_gate) * x W_up) W_down` instead of `f(x W_up) W_down`.
        idle: whether a mask `idle` [F] tells which inner features skip the activation and the gate.
        direct: whether a kernel `direct` [D, D], which skips it too, is beside the feed-forward's.
        norm: "layer", "rms", "rms_float32" (scaled before it is rounded), or "rms_plus_one" (likewise, and
            the stored scale is a difference from one).
        norm_epsilon: added to the variance.
        norm_order: "pre" (`x + f(norm(x))`), "post" (`norm(x + f(x))`), or "sandwich"
            (`x + norm(f(norm(x)))`).
        qkv_bias: whether query, key and value have a bias.
        fused_qkv: whether their kernels are one, `qkv` [D, (N + 2 K) H], query first.
        output_bias: whether the attention's output has one.
        feed_forward_bias: whether the feed-forward has them.
        qk_norm: whether queries and keys are RMS-normed per head.
        rotary: whether queries and keys are turned by `Context.rotation`.
        cross_attention: whether a branch that reads `Context.encoded` follows the attention's.
        causal: whether a token sees only those before it.
        window: how many places back a token sees, itself included; None is all.
        softcap: bound of the attention scores.
        sinks: whether each head has a learned score of no key, which takes its share of the softmax.
        query_scale: factor of the scores; default `H ** -0.5`.
        attention_dropout: rate on the attention weights.
        output_dropout: rate on what each branch adds.
        inner_dropout: rate on what the activation gives.
        init_std: deviation of new kernels.
        scaled_init: whether that is times `in ** -0.5` for a kernel [in, out].
        residuals: how many bits the backward pass keeps of each kind; None keeps the compute dtype.
        feed_forward_tile: how many of each row's tokens the feed-forward takes at a time; None is all.
        offloaded_tokens: the share of each row's tokens for which the policy "offload_attention" recomputes
            norms and activations only.
        attention: "rows", blocks of query rows, or "flash", the platform's kernel where there is one.
        windows: the widths that `Context.window` may have, where layers differ and attention is "flash".
        mesh: on which heads and inner features lie over `tensor`; None leaves them to the compiler.
        rounding: how many bits what enters linear layers is rounded to; None rounds nothing.

    Raises:
        PeftError: it does two of these: has experts, rounds what enters linear layers, keeps codes of that,
            or has idle features or a direct kernel, of which the last goes with rounding alone.
    """

    width: int
    num_heads: int
    inner_size: int
    activation: str
    norm_epsilon: float
    experts: Experts | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    idle: bool = False
    direct: bool = False
    norm: Literal["layer", "rms", "rms_float32", "rms_plus_one"] = "layer"
    norm_order: Literal["pre", "post", "sandwich"] = "pre"
    qkv_bias: bool = True
    fused_qkv: bool = False
    output_bias: bool = True
    feed_forward_bias: bool = True
    qk_norm: bool = False
    rotary: bool = False
    cross_attention: bool = False
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    query_scale: float | None = None
    attention_dropout: float = 0.0
    output_dropout: float = 0.0
    inner_dropout: float = 0.0
    init_std: float = 0.02
    scaled_init: bool = False
    residuals: Bits | None = None
    feed_forward_tile: int | None = None
    offloaded_tokens: float = 0.0
    rounding: Rounding | None = None
    attention: AttentionKind = "rows"
    windows: tuple[int, ...] = ()
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if (self.idle or self.direct) and (self.experts is not None or self.residuals is not None):
            other = "experts" if self.experts is not None else "coded residuals"
            raise PeftError(f"idle features of a feed-forward are not known with {other}; leave repavit out")
        if self.rounding is not None and self.residuals is not None:
            raise PeftError(
                "chain: 'rounded_activations' and coded residuals both change what enters a linear layer; "
                "leave one of the two out"
            )
        if self.experts is not None and self.residuals is not None:
            raise PeftError(
                "coded residuals know no experts; leave coded_residuals or s2a out, and save memory with the "
                "model's remat"
            )
        if self.experts is not None and self.rounding is not None:
            raise PeftError(
                "rounded activations know no experts; leave rounded_activations out, and round the weights "
                "alone (pj.quantized)"
            )

    @property
    def head_width(self) -> int:
        """H."""
        return self.head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads

    def deviation(self, inputs: int) -> float:
        """The deviation of a new kernel [inputs, out]."""
        return self.init_std * inputs**-0.5 if self.scaled_init else self.init_std


def make_norm(config: BlockConfig, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """The norm of a family, with parameters `scale` and, for a layer norm, `bias`."""
    if config.norm == "layer":
        return layer_norm(config.norm_epsilon, dtype, name)
    if config.norm == "rms_plus_one":
        return RMSNorm(config.norm_epsilon, dtype, offset=1.0, scale_last=False, name=name)
    return RMSNorm(config.norm_epsilon, dtype, scale_last=config.norm == "rms", name=name)
