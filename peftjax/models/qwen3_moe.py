"""Qwen 3 with experts (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.block_config import Experts
from peftjax.models.decoder import FULL, SLIDING, DecoderConfig, read_windows, window_settings
from peftjax.models.expert_tensors import experts, from_single, router, to_single
from peftjax.models.family import require_settings
from peftjax.models.llama import (
    ATTENTION,
    BLOCK_NORMS,
    LAYER,
    QUERY_KEY_NORMS,
    TABLES,
    attention_biases,
    complete,
    llama_config,
    llama_family,
)
from peftjax.models.mixtral import require_choice

DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
NAMES = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
WEIGHTS = (
    *TABLES,
    *ATTENTION,
    *BLOCK_NORMS,
    *QUERY_KEY_NORMS,
    *router("blocks/feed_forward/router", LAYER + "mlp.gate"),
    *experts("blocks/feed_forward/experts", LAYER + "mlp.experts"),
)


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`; every layer has experts, and the same window.

    Raises:
        PeftError: as `complete`, `llama_config`, `read_windows` and `require_choice`.
    """
    values = complete(values, DEFAULTS)
    # Layers without experts would be blocks of another kind in one stack.
    require_settings("qwen3_moe", {**values, "mlp_only_layers": values["mlp_only_layers"] or []}, _ONLY)
    chosen = Experts(
        count=values.get("num_local_experts") or values["num_experts"],
        chosen=values["num_experts_per_tok"],
        normalized=bool(values["norm_topk_prob"]),
    )
    block = {
        "qk_norm": True,
        "inner_size": values["moe_intermediate_size"],
        "experts": require_choice("qwen3_moe", chosen),
        **attention_biases(values),
    }
    sees = bool(values["use_sliding_window"] and values["sliding_window"])
    types = [SLIDING if sees else FULL] * values["num_hidden_layers"]
    window, settings = window_settings(read_windows({**values, "layer_types": None}, types))
    return llama_config(values, block={**block, **window}, **settings)


_ONLY = {"decoder_sparse_step": 1, "mlp_only_layers": []}
QWEN3_MOE = llama_family(
    "qwen3_moe", read_config, "Qwen3Moe", WEIGHTS, gathered=from_single(NAMES), scattered=to_single(NAMES)
)
