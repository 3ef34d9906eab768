"""Gemma 1, 2 and 3, the text models (Gemma Team 2024, 2025, arXiv 2403.08295, 2408.00118, 2503.19786).

Against Llama: embeddings times `sqrt(D)`, norms that store a difference from one, GELU, a tied output
layer. Gemma 2 norms what each branch adds too, bounds scores and logits, and every other layer sees a
window. Gemma 3 norms queries and keys instead of bounding, and five layers of six see a window, with a
rotation of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.rope import read_rope
from peftjax.models.decoder import FULL, SLIDING, DecoderConfig, read_windows, window_settings
from peftjax.models.family import require_settings
from peftjax.models.llama import (
    LAYER,
    QUERY_KEY_NORMS,
    SHARED,
    attention_biases,
    complete,
    llama_config,
    llama_family,
    scale,
)

DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "max_position_embeddings": 8192,
}
DEFAULTS2 = {
    **DEFAULTS,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
DEFAULTS3 = {
    **DEFAULTS2,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0

SANDWICH_NORMS = (
    scale("blocks/attention_norm", LAYER + "input_layernorm"),
    scale("blocks/attention_post_norm", LAYER + "post_attention_layernorm"),
    scale("blocks/feed_forward_norm", LAYER + "pre_feedforward_layernorm"),
    scale("blocks/feed_forward_post_norm", LAYER + "post_feedforward_layernorm"),
)


def read_gemma(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration of Gemma 1 in the content of a `config.json`.

    Raises:
        PeftError: as `complete` and `llama_config`.
    """
    values = complete(values, DEFAULTS)
    # The first release says "gelu" and means its tanh form.
    gelu = values["hidden_act"] == "gelu"
    return _gemma(values, {"activation": "gelu_pytorch_tanh" if gelu else values["hidden_act"]})


def read_gemma2(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration of Gemma 2 in the content of a `config.json`.

    Raises:
        PeftError: as `complete`, `llama_config` and `read_windows`.
    """
    values = complete(values, DEFAULTS2)
    own, settings = window_settings(_windows(values, 2))
    block = {**_sandwich(values), "softcap": values["attn_logit_softcapping"], **own}
    return _gemma(values, block, logit_softcap=values["final_logit_softcapping"], **settings)


def read_gemma3(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration of Gemma 3's text model in the content of a `config.json`.

    Raises:
        PeftError: as `complete`, `llama_config`, `read_windows` and `read_rope`.
    """
    values = complete(values, DEFAULTS3)
    require_settings("gemma3_text", values, {"attn_logit_softcapping": None})
    windows = _windows(values, values["sliding_window_pattern"])
    own, settings = window_settings(windows)
    given = values.get("rope_parameters") or {}
    far = {**(given.get(FULL) or {}), **(values.get("rope_scaling") or {})}
    near = {"rope_theta": values.get("rope_local_base_freq") or LOCAL_THETA, **(given.get(SLIDING) or {})}
    ropes = {"rope": read_rope(far, values, GLOBAL_THETA), "local_rope": read_rope(near, values)}
    if not settings:
        ropes = {"rope": ropes["rope" if windows[0] is None else "local_rope"]}
    block = {**_sandwich(values), "qk_norm": True, **own}
    return _gemma(values, block, logit_softcap=values["final_logit_softcapping"], **ropes, **settings)


def _gemma(values: Mapping[str, Any], block: Mapping[str, Any], **settings: Any) -> DecoderConfig:
    both_ways = bool(values.get("use_bidirectional_attention"))
    require_settings(
        values["model_type"],
        {"use_bidirectional_attention": both_ways},
        {"use_bidirectional_attention": False},
    )
    return llama_config(
        values,
        block={"norm": "rms_plus_one", **attention_biases(values), **block},
        embedding_scale=values["hidden_size"] ** 0.5,
        **settings,
    )


def _sandwich(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the blocks of Gemma 2 and 3 share."""
    return {
        "norm_order": "sandwich",
        "activation": values["hidden_activation"],
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
    }


def _windows(values: Mapping[str, Any], every: int) -> tuple[int | None, ...]:
    """The windows of a stack whose `every`-th layers see all."""
    layers = range(1, values["num_hidden_layers"] + 1)
    return read_windows(values, [SLIDING if layer % every else FULL for layer in layers])


GEMMA = llama_family("gemma", read_gemma, "Gemma")
GEMMA2 = llama_family("gemma2", read_gemma2, "Gemma2", (*SHARED, *SANDWICH_NORMS))
GEMMA3 = llama_family(
    "gemma3_text",
    read_gemma3,
    "Gemma3",
    (*SHARED, *SANDWICH_NORMS, *QUERY_KEY_NORMS),
    base="Gemma3Text",
)
