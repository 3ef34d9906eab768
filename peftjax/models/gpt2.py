"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.layers import ACTIVATIONS
from peftjax.models.decoder import DecoderConfig, LearnedPositions, decoder, decoder_heads, write_config
from peftjax.models.family import Family, read_labels, require_known, require_settings, with_prefix
from peftjax.models.weight_map import TensorEntry, conv1d, embedding, linear, norm

LAYER = "transformer.h.{layer}."
WEIGHTS: tuple[TensorEntry, ...] = (
    embedding("embed/word", "transformer.wte"),
    embedding("embed/position", "transformer.wpe"),
    *norm("blocks/attention_norm", LAYER + "ln_1"),
    *conv1d("blocks/attention/qkv", LAYER + "attn.c_attn"),
    *conv1d("blocks/attention/output", LAYER + "attn.c_proj"),
    *norm("blocks/feed_forward_norm", LAYER + "ln_2"),
    *conv1d("blocks/feed_forward/up", LAYER + "mlp.c_fc"),
    *conv1d("blocks/feed_forward/down", LAYER + "mlp.c_proj"),
    *norm("head/norm", "transformer.ln_f"),
    *linear("head/output", "lm_head"),
    *linear("head/classifier", "score"),
)
# Causal masks.
IGNORED = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
# Settings that would change the computation, with the only value this backbone computes.
REQUIRED = {
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `DecoderConfig`.
    """
    require_settings("gpt2", values, REQUIRED)
    activation = values.get("activation_function", "gelu_new")
    require_known("gpt2", "activation_function", activation, ACTIVATIONS)
    width = values.get("n_embd", 768)
    block = BlockConfig(
        width=width,
        num_heads=values.get("n_head", 12),
        inner_size=values.get("n_inner") or 4 * width,
        activation=activation,
        norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        fused_qkv=True,
        causal=True,
        query_scale=None if values.get("scale_attn_weights", True) else 1.0,
        attention_dropout=values.get("attn_pdrop", 0.1),
        output_dropout=values.get("resid_pdrop", 0.1),
        init_std=values.get("initializer_range", 0.02),
    )
    return DecoderConfig(
        model_type="gpt2",
        vocab_size=values.get("vocab_size", 50257),
        num_layers=values.get("n_layer", 12),
        block=block,
        max_positions=values.get("n_positions", 1024),
        learned_positions=LearnedPositions(),
        embedding_dropout=values.get("embd_pdrop", 0.1),
        tied=values.get("tie_word_embeddings", True),
        pad_token_id=values.get("pad_token_id"),
        labels=read_labels(values),
        values=dict(values),
    )


GPT2 = Family(
    name="gpt2",
    read_config=read_config,
    write_config=write_config,
    build=decoder,
    heads=decoder_heads("GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2Model"),
    weights=WEIGHTS,
    canonical=with_prefix("transformer.", "lm_head.", "score."),
    ignored=IGNORED,
    prefix="transformer.",
)
