"""OPT (Zhang et al. 2022, arXiv 2205.01068)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.layers import ACTIVATIONS
from peftjax.models.decoder import DecoderConfig, LearnedPositions, decoder, decoder_heads, write_config
from peftjax.models.family import Family, read_labels, require_known, require_settings, with_prefix
from peftjax.models.weight_map import TensorEntry, embedding, linear, norm

LAYER = "model.decoder.layers.{layer}."
WEIGHTS: tuple[TensorEntry, ...] = (
    embedding("embed/word", "model.decoder.embed_tokens"),
    embedding("embed/position", "model.decoder.embed_positions"),
    *linear("embed/project_in", "model.decoder.project_in"),
    *norm("blocks/attention_norm", LAYER + "self_attn_layer_norm"),
    *linear("blocks/attention/query", LAYER + "self_attn.q_proj"),
    *linear("blocks/attention/key", LAYER + "self_attn.k_proj"),
    *linear("blocks/attention/value", LAYER + "self_attn.v_proj"),
    *linear("blocks/attention/output", LAYER + "self_attn.out_proj"),
    *norm("blocks/feed_forward_norm", LAYER + "final_layer_norm"),
    *linear("blocks/feed_forward/up", LAYER + "fc1"),
    *linear("blocks/feed_forward/down", LAYER + "fc2"),
    *norm("head/norm", "model.decoder.final_layer_norm"),
    *linear("head/project_out", "model.decoder.project_out"),
    *linear("head/output", "lm_head"),
    *linear("head/classifier", "score"),
)
# Settings that would change the computation, with the only value this backbone computes.
REQUIRED = {"layer_norm_elementwise_affine": True, "layerdrop": 0.0}


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `DecoderConfig`.
    """
    require_settings("opt", values, REQUIRED)
    activation = values.get("activation_function", "relu")
    require_known("opt", "activation_function", activation, ACTIVATIONS)
    width, bias = values.get("hidden_size", 768), values.get("enable_bias", True)
    norm_first = values.get("do_layer_norm_before", True)
    embedding_width = values.get("word_embed_proj_dim")
    block = BlockConfig(
        width=width,
        num_heads=values.get("num_attention_heads", 12),
        inner_size=values.get("ffn_dim", 3072),
        activation=activation,
        norm_epsilon=1e-5,
        norm_order="pre" if norm_first else "post",
        qkv_bias=bias,
        output_bias=bias,
        feed_forward_bias=bias,
        causal=True,
        attention_dropout=values.get("attention_dropout", 0.0),
        output_dropout=values.get("dropout", 0.1),
        init_std=values.get("init_std", 0.02),
    )
    return DecoderConfig(
        model_type="opt",
        vocab_size=values.get("vocab_size", 50272),
        num_layers=values.get("num_hidden_layers", 12),
        block=block,
        max_positions=values.get("max_position_embeddings", 2048),
        learned_positions=LearnedPositions(offset=2, by_mask=True),
        embedding_width=None if embedding_width == width else embedding_width,
        final_norm=norm_first and not values.get("_remove_final_layer_norm", False),
        tied=values.get("tie_word_embeddings", True),
        pad_token_id=values.get("pad_token_id", 1),
        labels=read_labels(values),
        values=dict(values),
    )


OPT = Family(
    name="opt",
    read_config=read_config,
    write_config=write_config,
    build=decoder,
    heads=decoder_heads("OPTForCausalLM", "OPTForSequenceClassification", "OPTModel"),
    weights=WEIGHTS,
    canonical=with_prefix("model.", "lm_head.", "score."),
    prefix="model.",
)
