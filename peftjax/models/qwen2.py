"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv 2407.10671, 2412.15115): biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.models.decoder import FULL, SLIDING, DecoderConfig, read_windows, window_settings
from peftjax.models.llama import complete, llama_config, llama_family

DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: as `complete`, `llama_config` and `read_windows`.
    """
    return qwen_config(complete(values, DEFAULTS), {"qkv_bias": True})


def qwen_config(values: Mapping[str, Any], block: Mapping[str, Any]) -> DecoderConfig:
    """The configuration of Qwen, whose layers from `max_window_layers` on may see a window."""
    sees = values if values["use_sliding_window"] else {**values, "sliding_window": None}
    first = values["max_window_layers"] if sees["sliding_window"] is not None else values["num_hidden_layers"]
    types = [SLIDING if layer >= first else FULL for layer in range(values["num_hidden_layers"])]
    own, settings = window_settings(read_windows(sees, types))
    return llama_config(values, block={**block, **own}, **settings)


QWEN2 = llama_family("qwen2", read_config, "Qwen2")
