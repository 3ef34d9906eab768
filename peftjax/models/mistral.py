"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.models.decoder import FULL, SLIDING, DecoderConfig, read_windows, window_settings
from peftjax.models.family import require_settings
from peftjax.models.llama import complete, llama_config, llama_family

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
# Layers of different kinds belong to other families there; a reader of Mistral would pass over them.
REQUIRED = {"layer_types": None}


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`; `sliding_window` null is none.

    Raises:
        PeftError: as `complete`, `llama_config` and `read_windows`.
    """
    values = complete(values, DEFAULTS)
    require_settings("mistral", values, REQUIRED)
    kind = FULL if values["sliding_window"] is None else SLIDING
    block, settings = window_settings(read_windows(values, [kind] * values["num_hidden_layers"]))
    return llama_config(values, block=block, **settings)


MISTRAL = llama_family("mistral", read_config, "Mistral")
