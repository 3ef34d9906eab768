"""The settings of each family's `config.json` by type and range, checked before anything is made of them.

A setting may be absent, and `null` where the family has a meaning for that. The largest sizes are several
times those of any checkpoint, so that a wrong one is named before memory is asked for. What a family needs,
and which settings fit each other, its own reader says.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from msgspec import Meta

from peftjax.models.resize import LARGEST_VOCABULARY

Size = Annotated[int, Meta(ge=0, le=2**20)]
Layers = Annotated[int, Meta(ge=0, le=10_000)]
Vocabulary = Annotated[int, Meta(ge=0, le=LARGEST_VOCABULARY)]
Places = Annotated[int, Meta(ge=0, le=10**9)]
Labels = Annotated[int, Meta(ge=1, le=1_000_000)]
Token = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
Rate = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1e12)]
Deviation = Annotated[float, Meta(ge=0.0, le=1e6)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every family reads."""

    model_type: str
    architectures: list[str] | None = None
    id2label: dict[str, str | int] | None = None
    num_labels: Labels | None = None
    pad_token_id: Token | None = None
    tie_word_embeddings: bool | None = None
    vocab_size: Vocabulary | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How rotary positions are scaled, or, by the kind of layer, those of each."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Annotated[float, Meta(gt=1.0, le=1e12)] | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Annotated[int, Meta(ge=2, le=10**9)] | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Deviation | None = None
    mscale_all_dim: Deviation | None = None
    truncate: bool = True
    partial_rotary_factor: float | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    full_attention: Rope | None = None
    sliding_attention: Rope | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaSettings(Common):
    """Of Llama and the families that are like it."""

    hidden_size: Size | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    intermediate_size: Size | None = None
    head_dim: Size | None = None
    hidden_act: str = ""
    hidden_activation: str | None = None
    rms_norm_eps: Rate = 0.0
    max_position_embeddings: Places = 0
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    attention_dropout: Rate | None = None
    initializer_range: Deviation = 0.0
    rope_theta: Annotated[float, Meta(gt=1.0, le=1e12)] | None = None
    rope_local_base_freq: Annotated[float, Meta(gt=1.0, le=1e12)] | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    original_max_position_embeddings: Annotated[int, Meta(ge=2, le=10**9)] | None = None
    partial_rotary_factor: float | None = None
    sliding_window: Places | None = None
    sliding_window_pattern: Annotated[int, Meta(ge=1, le=10_000)] = 1
    use_sliding_window: bool | None = None
    max_window_layers: Places = 0
    layer_types: list[str] | None = None
    query_pre_attn_scalar: Positive = 1.0
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    num_experts: Size | None = None
    num_local_experts: Size | None = None
    num_experts_per_tok: Size | None = None
    moe_intermediate_size: Size | None = None
    norm_topk_prob: bool | None = None
    decoder_sparse_step: Layers | None = None
    mlp_only_layers: list[int] | None = None
    swiglu_alpha: Positive | None = None
    swiglu_limit: Positive | None = None
    router_jitter_noise: Deviation | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Settings(Common):
    """Of GPT-2."""

    vocab_size: Vocabulary = 0
    n_embd: Size = 0
    n_layer: Layers = 0
    n_head: Size = 0
    n_inner: Size | None = None
    n_positions: Places = 0
    activation_function: str = ""
    layer_norm_epsilon: Rate = 0.0
    scale_attn_weights: bool = True
    attn_pdrop: Rate = 0.0
    resid_pdrop: Rate = 0.0
    embd_pdrop: Rate = 0.0
    initializer_range: Deviation = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTSettings(Common):
    """Of OPT."""

    vocab_size: Vocabulary = 0
    hidden_size: Size = 0
    num_hidden_layers: Layers = 0
    num_attention_heads: Size = 0
    ffn_dim: Size = 0
    max_position_embeddings: Places = 0
    word_embed_proj_dim: Size | None = None
    activation_function: str = ""
    enable_bias: bool = True
    do_layer_norm_before: bool = True
    attention_dropout: Rate = 0.0
    dropout: Rate = 0.0
    init_std: Deviation = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSettings(Common):
    """Of BERT, RoBERTa, XLM-R and, with its images, ViT."""

    vocab_size: Vocabulary = 0
    hidden_size: Size = 0
    num_hidden_layers: Layers = 0
    num_attention_heads: Size = 0
    intermediate_size: Size = 0
    hidden_act: str = ""
    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    classifier_dropout: Rate | None = None
    max_position_embeddings: Annotated[int, Meta(ge=0, le=10**8)] = 0
    type_vocab_size: Size = 0
    initializer_range: Deviation = 0.0
    layer_norm_eps: Rate = 0.0
    image_size: Size | list[Size] = 0
    patch_size: Size | list[Size] = 0
    num_channels: Size = 0
    qkv_bias: bool = True
    pooler_output_size: Size | None = None
    pooler_act: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Settings(Common):
    """Of T5 and mT5."""

    d_model: Size = 0
    d_kv: Size = 0
    d_ff: Size = 0
    num_layers: Layers = 0
    num_decoder_layers: Layers | None = None
    num_heads: Size = 0
    feed_forward_proj: str = ""
    dense_act_fn: str = ""
    is_gated_act: bool = False
    relative_attention_num_buckets: Size = 0
    relative_attention_max_distance: Places = 0
    dropout_rate: Rate = 0.0
    classifier_dropout: Rate = 0.0
    layer_norm_epsilon: Rate = 0.0
    initializer_factor: Deviation = 0.0
    scale_decoder_outputs: bool = True
    eos_token_id: Token | list[Token] | None = None
    decoder_start_token_id: Token | None = None


def of_family(name: str) -> type[Any]:
    """The schema of a family by its `model_type`."""
    own = {"gpt2": GPT2Settings, "opt": OPTSettings, "t5": T5Settings, "mt5": T5Settings}
    encoders = dict.fromkeys(("bert", "roberta", "xlm-roberta", "vit"), EncoderSettings)
    return {**own, **encoders}.get(name, LlamaSettings)
