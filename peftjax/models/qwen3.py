"""Qwen 3 (Yang et al. 2025, arXiv 2505.09388): queries and keys are normed per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.models.decoder import DecoderConfig
from peftjax.models.llama import (
    BLOCK_NORMS,
    QUERY_KEY_NORMS,
    SHARED,
    attention_biases,
    complete,
    llama_family,
)
from peftjax.models.qwen2 import DEFAULTS as QWEN2_DEFAULTS
from peftjax.models.qwen2 import qwen_config

DEFAULTS = {**QWEN2_DEFAULTS, "head_dim": 128}


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: as `complete`, `llama_config` and `read_windows`.
    """
    values = complete(values, DEFAULTS)
    return qwen_config(values, {"qk_norm": True, **attention_biases(values)})


QWEN3 = llama_family("qwen3", read_config, "Qwen3", (*SHARED, *BLOCK_NORMS, *QUERY_KEY_NORMS))
