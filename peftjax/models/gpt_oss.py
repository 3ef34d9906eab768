"""gpt-oss (OpenAI 2025, arXiv 2508.10925): experts with biases, and attention with sinks.

Against Llama: the feed-forward is one of experts whose gated activation is bounded, each head has a learned
score of no key, every other layer sees a window, and positions are YaRN's. A file has the experts as floats
or as MXFP4's codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftjax.backbone.block_config import Experts
from peftjax.backbone.rope import read_rope
from peftjax.models.decoder import FULL, SLIDING, DecoderConfig, read_windows, window_settings
from peftjax.models.expert_tensors import experts, from_interleaved, router, to_interleaved
from peftjax.models.family import require_settings
from peftjax.models.llama import (
    ATTENTION,
    BLOCK_NORMS,
    LAYER,
    TABLES,
    attention_biases,
    complete,
    llama_config,
    llama_family,
)
from peftjax.models.mixtral import require_choice
from peftjax.models.weight_map import TensorEntry

DEFAULTS = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
THETA = 150_000.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# What experts compute, whatever `hidden_act` says: x sigmoid(1.702 x), gated.
ACTIVATION, REQUIRED = "quick_gelu", {"swiglu_alpha": 1.702, "hidden_act": "silu"}
WEIGHTS = (
    *TABLES,
    *ATTENTION,
    *BLOCK_NORMS,
    TensorEntry("blocks/attention/sinks", LAYER + "self_attn.sinks"),
    *router("blocks/feed_forward/router", LAYER + "mlp.router"),
    *experts("blocks/feed_forward/experts", LAYER + "mlp.experts", bias=True),
)


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in the content of a `config.json`.

    Raises:
        PeftError: as `complete`, `llama_config`, `read_windows`, `read_rope` and `require_choice`.
    """
    values = complete(values, DEFAULTS)
    require_settings("gpt_oss", values, REQUIRED)
    types = [FULL if layer % 2 else SLIDING for layer in range(values["num_hidden_layers"])]
    own, settings = window_settings(read_windows(values, types))
    chosen = Experts(
        count=values["num_local_experts"],
        chosen=values["num_experts_per_tok"],
        router_bias=True,
        bound=values["swiglu_limit"],
    )
    block = {
        **attention_biases(values),
        "feed_forward_bias": True,
        "sinks": True,
        "norm": "rms_float32",
        "activation": ACTIVATION,
        "experts": require_choice("gpt_oss", chosen),
        **own,
    }
    rope = read_rope(values.get("rope_scaling") or values.get("rope_parameters") or YARN, values, THETA)
    return llama_config(values, block=block, rope=rope, **settings)


GPT_OSS = llama_family(
    "gpt_oss",
    read_config,
    "GptOss",
    WEIGHTS,
    gathered=from_interleaved,
    scattered=to_interleaved,
    interleaved=True,
)
