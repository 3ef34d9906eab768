"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.block_config import Experts
from peftjax.core.errors import PeftError
from peftjax.models.decoder import FULL, SLIDING, DecoderConfig, read_windows, window_settings
from peftjax.models.expert_tensors import experts, from_single, router, to_single
from peftjax.models.family import require_settings, require_size
from peftjax.models.llama import (
    ATTENTION,
    BLOCK_NORMS,
    CANONICAL,
    LAYER,
    TABLES,
    complete,
    llama_config,
    llama_family,
)

DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MODULE = LAYER + "block_sparse_moe."
NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
WEIGHTS = (
    *TABLES,
    *ATTENTION,
    *BLOCK_NORMS,
    *router("blocks/feed_forward/router", MODULE + "gate"),
    *experts("blocks/feed_forward/experts", MODULE + "experts"),
)


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`; `sliding_window` null is none.

    Raises:
        PeftError: as `complete`, `llama_config`, `read_windows` and `require_choice`.
    """
    values = complete(values, DEFAULTS)
    require_settings("mixtral", values, {"router_jitter_noise": 0.0})
    kind = FULL if values["sliding_window"] is None else SLIDING
    block, settings = window_settings(read_windows(values, [kind] * values["num_hidden_layers"]))
    chosen = Experts(count=values["num_local_experts"], chosen=values["num_experts_per_tok"])
    return llama_config(values, block={"experts": require_choice("mixtral", chosen), **block}, **settings)


def require_choice(model_type: str, experts: Experts) -> Experts:
    """The experts, after a check that so many can be chosen.

    Raises:
        PeftError: they cannot.
    """
    for name in ("count", "chosen"):
        require_size(model_type, f"experts' {name}", getattr(experts, name))
    if experts.chosen > experts.count:
        raise PeftError(
            f"{model_type}: num_experts_per_tok {experts.chosen} is more than there are experts, "
            f"{experts.count}"
        )
    return experts


MIXTRAL = llama_family(
    "mixtral",
    read_config,
    "Mixtral",
    WEIGHTS,
    canonical=lambda name: CANONICAL(name).replace(".mlp.", ".block_sparse_moe."),
    in_memory=lambda name: name.replace(".block_sparse_moe.", ".mlp."),
    gathered=from_single(NAMES),
    scattered=to_single(NAMES),
)
