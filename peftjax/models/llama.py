"""Llama 2 and 3 (Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from peftjax.backbone.block_config import BlockConfig
from peftjax.backbone.layers import ACTIVATIONS
from peftjax.backbone.rope import read_rope
from peftjax.core.errors import PeftError
from peftjax.models.decoder import DecoderConfig, decoder, decoder_heads, write_config
from peftjax.models.family import Family, read_labels, require_known, with_prefix
from peftjax.models.weight_map import TensorEntry, embedding, linear

LAYER = "model.layers.{layer}."


def scale(path: str, name: str) -> TensorEntry:
    """The scale of an RMS norm."""
    return TensorEntry(f"{path}/scale", f"{name}.weight")


BLOCK_NORMS = (
    scale("blocks/attention_norm", LAYER + "input_layernorm"),
    scale("blocks/feed_forward_norm", LAYER + "post_attention_layernorm"),
)
QUERY_KEY_NORMS = (
    scale("blocks/attention/query_norm", LAYER + "self_attn.q_norm"),
    scale("blocks/attention/key_norm", LAYER + "self_attn.k_norm"),
)
"""Norms that Llama lacks and some of its relatives have."""
TABLES = (
    embedding("embed/word", "model.embed_tokens"),
    scale("head/norm", "model.norm"),
    *linear("head/output", "lm_head"),
    *linear("head/classifier", "score"),
)
ATTENTION = (
    *linear("blocks/attention/query", LAYER + "self_attn.q_proj"),
    *linear("blocks/attention/key", LAYER + "self_attn.k_proj"),
    *linear("blocks/attention/value", LAYER + "self_attn.v_proj"),
    *linear("blocks/attention/output", LAYER + "self_attn.o_proj"),
)
SHARED = (
    *TABLES,
    *ATTENTION,
    *linear("blocks/feed_forward/gate", LAYER + "mlp.gate_proj"),
    *linear("blocks/feed_forward/up", LAYER + "mlp.up_proj"),
    *linear("blocks/feed_forward/down", LAYER + "mlp.down_proj"),
)
"""Every weight but the norms of the blocks."""
CANONICAL = with_prefix("model.", "lm_head.", "score.")
# The rotation's frequencies, and a constant of old masks.
IGNORED = r".*rotary_emb\.inv_freq|.*\.masked_bias"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: as `complete` and `llama_config`.
    """
    values = complete(values, {})
    return llama_config(values, block={**attention_biases(values), "feed_forward_bias": values["mlp_bias"]})


def complete(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` with what the family has where it says nothing.

    Raises:
        PeftError: for a size that is absent.
    """
    for name in SIZES:
        if values.get(name) is None:
            raise PeftError(f"config.json of {values['model_type']} has no {name}")
    return {**DEFAULTS, **defaults, **values}


def attention_biases(values: Mapping[str, Any]) -> dict[str, bool]:
    """The biases of a family whose `attention_bias` is for query, key, value and output alike."""
    return {"qkv_bias": values["attention_bias"], "output_bias": values["attention_bias"]}


def llama_config(
    values: Mapping[str, Any], *, block: Mapping[str, Any] | None = None, **settings: Any
) -> DecoderConfig:
    """The configuration of a family like Llama, without biases.

    Args:
        values: what `complete` made of `config.json`.
        block: where its `BlockConfig` differs from that.
        settings: where its `DecoderConfig` does.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `DecoderConfig`.
    """
    model_type = values["model_type"]
    blocks = {
        "width": values["hidden_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "inner_size": values["intermediate_size"],
        "activation": values["hidden_act"],
        "gated": True,
        "norm": "rms",
        "norm_epsilon": values["rms_norm_eps"],
        "qkv_bias": False,
        "output_bias": False,
        "feed_forward_bias": False,
        "rotary": True,
        "causal": True,
        "attention_dropout": values["attention_dropout"] or 0.0,
        "init_std": values["initializer_range"],
        **(block or {}),
    }
    require_known(model_type, "activation", blocks["activation"], ACTIVATIONS)
    config = {
        "model_type": model_type,
        "vocab_size": values["vocab_size"],
        "num_layers": values["num_hidden_layers"],
        "block": BlockConfig(**blocks),
        "max_positions": values["max_position_embeddings"],
        "tied": values["tie_word_embeddings"],
        "pad_token_id": values.get("pad_token_id"),
        "labels": read_labels(values),
        "values": dict(values),
        **settings,
    }
    if "rope" not in config:
        config["rope"] = read_rope(values.get("rope_scaling") or values.get("rope_parameters"), values)
    return DecoderConfig(**config)


def llama_family(
    name: str,
    read_config: Callable[[Mapping[str, Any]], DecoderConfig],
    classes: str,
    weights: tuple[TensorEntry, ...] = (*SHARED, *BLOCK_NORMS),
    base: str = "",
    **settings: Any,
) -> Family:
    """A family like Llama.

    Args:
        name: Hugging Face's `model_type`.
        read_config: content of `config.json` -> configuration.
        classes: what its Hugging Face classes' names begin with; of the classifier and the base model,
            `base`.
        weights: every parameter with its Hugging Face name.
        base: as `classes`, where it differs.
        settings: where its `Family` differs from Llama's.
    """
    base = base or classes
    own = Family(
        name=name,
        read_config=read_config,
        write_config=write_config,
        build=decoder,
        heads=decoder_heads(f"{classes}ForCausalLM", f"{base}ForSequenceClassification", f"{base}Model"),
        weights=weights,
        canonical=CANONICAL,
        ignored=IGNORED,
        prefix="model.",
    )
    return dataclasses.replace(own, **settings)


LLAMA = llama_family("llama", read_config, "Llama")
