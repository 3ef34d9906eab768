"""Llama 2 and 3 (Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.models.block import BlockConfig
from peftjax.models.decoder import DecoderConfig, decoder, decoder_heads, write_config
from peftjax.models.family import Family, read_labels, require_known
from peftjax.models.layers import ACTIVATIONS
from peftjax.models.rope import rope_type
from peftjax.models.weight_map import Weight, embedding, linear

LAYER = "model.layers.{layer}."


def scale(path: str, name: str) -> Weight:
    """The scale of an RMS norm."""
    return Weight(f"{path}/scale", f"{name}.weight")


WEIGHTS: tuple[Weight, ...] = (
    embedding("embed/word", "model.embed_tokens"),
    scale("blocks/attention_norm", LAYER + "input_layernorm"),
    *linear("blocks/attention/query", LAYER + "self_attn.q_proj"),
    *linear("blocks/attention/key", LAYER + "self_attn.k_proj"),
    *linear("blocks/attention/value", LAYER + "self_attn.v_proj"),
    *linear("blocks/attention/output", LAYER + "self_attn.o_proj"),
    scale("blocks/feed_forward_norm", LAYER + "post_attention_layernorm"),
    *linear("blocks/feed_forward/gate", LAYER + "mlp.gate_proj"),
    *linear("blocks/feed_forward/up", LAYER + "mlp.up_proj"),
    *linear("blocks/feed_forward/down", LAYER + "mlp.down_proj"),
    scale("head/norm", "model.norm"),
    *linear("head/output", "lm_head"),
    *linear("head/classifier", "score"),
)
# The rotation's frequencies, and output layers of other heads or tied to the embedding.
IGNORED = r".*rotary_emb\.inv_freq|lm_head\.weight|score\.weight|.*\.masked_bias"
ACTIVATION = "silu"


def rope_settings(values: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Hugging Face's rope settings, of its present `rope_parameters` or the older two keys.

    Raises:
        PeftError: for a `rope_type` that is not supported.
    """
    settings = {
        "rope_theta": values.get("rope_theta", theta),
        **(values.get("rope_scaling") or {}),
        **(values.get("rope_parameters") or {}),
    }
    rope_type(settings)
    return settings


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: for a setting this backbone does not compute, and as `DecoderConfig`.
    """
    return llama_config(values)


def llama_config(
    values: Mapping[str, Any], *, block: Mapping[str, Any] | None = None, **settings: Any
) -> DecoderConfig:
    """The configuration of a family like Llama.

    Args:
        values: the content of `config.json`.
        block: where its `BlockConfig` differs from Llama's.
        settings: where its `DecoderConfig` does.
    """
    who = values["model_type"]
    activation = values.get("hidden_act") or values.get("hidden_activation") or ACTIVATION
    require_known(who, "hidden_act", activation, ACTIVATIONS)
    attention_bias = values.get("attention_bias", False)
    blocks = {
        "width": values["hidden_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "inner_size": values["intermediate_size"],
        "activation": activation,
        "gated": True,
        "norm": "rms",
        "norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "feed_forward_bias": values.get("mlp_bias", False),
        "rotary": True,
        "causal": True,
        "attention_dropout": values.get("attention_dropout", 0.0),
        "init_std": values.get("initializer_range", 0.02),
        **(block or {}),
    }
    return DecoderConfig(
        **{
            "model_type": who,
            "vocab_size": values["vocab_size"],
            "num_layers": values["num_hidden_layers"],
            "block": BlockConfig(**blocks),
            "max_positions": values.get("max_position_embeddings", 2048),
            "rope": rope_settings(values),
            "tied": values.get("tie_word_embeddings", False),
            "pad_token_id": values.get("pad_token_id"),
            "labels": read_labels(values),
            "values": dict(values),
            **settings,
        }
    )


def canonical(name: str) -> str:
    """Hugging Face's present spelling: the `model.` prefix, which a base model's checkpoint lacks."""
    return name if name.startswith(("model.", "lm_head.", "score.")) else f"model.{name}"


LLAMA = Family(
    name="llama",
    read_config=read_config,
    write_config=write_config,
    build=decoder,
    heads=decoder_heads("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"),
    weights=WEIGHTS,
    canonical=canonical,
    ignored=IGNORED,
    prefix="model.",
)
