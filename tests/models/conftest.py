import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import all_but_slow, noisy

from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.families import FAMILIES

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}
WINDOW = {"sliding_window": 7}
GEMMA3_ROPES = {
    "full_attention": LINEAR_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
DECODERS = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "llama_biased": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", **WINDOW},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen3": {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 10, "num_key_value_heads": 1},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 10,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        **WINDOW,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 10,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": GEMMA3_ROPES,
        **WINDOW,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 10,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        **WINDOW,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3, **WINDOW},
}
"""The content of `config.json` of tiny decoders, one for each family and for each style of Llama."""


@pytest.fixture(scope="session")
def decoders():
    return {name: {**TINY, **values} for name, values in DECODERS.items()}


@pytest.fixture(scope="session", params=all_but_slow(DECODERS, ("llama3", "gemma2", "gemma3", "gpt_oss")))
def decoder_values(request, decoders):
    return decoders[request.param]


@pytest.fixture(scope="session")
def random_decoder():
    """`(values, head) -> (model, params)` with numbers that are far from trivial; nothing is compiled."""
    models = {}

    def make(values, head="causal_lm"):
        model = models.setdefault(json.dumps([values, head]), build(values, head))
        rng = np.random.default_rng(0)
        return model, jax.tree.map(
            lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), model.shapes
        )

    def build(values, head):
        family = FAMILIES[values["model_type"]]
        return family.build(family.read_config(values), head=head)

    return make


@pytest.fixture(scope="session")
def padded():
    """Two rows of 130 tokens, the first padded on the left and the second on the right."""
    rng = np.random.default_rng(0)
    places = np.arange(130)[None]
    mask = ((places >= [[9], [0]]) & (places < [[130], [110]])).astype(np.int32)
    ids = rng.integers(1, 61, mask.shape).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def config():
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=12,
        initializer_range=0.2,
        labels=("no", "maybe", "yes"),
    )


@pytest.fixture(scope="session")
def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([[9], [4]])
    mask = (np.arange(9) < lengths).astype(np.int32)
    ids = rng.integers(1, 50, (2, 9)).astype(np.int32) * mask
    types = rng.integers(0, 2, (2, 9)).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.fixture(scope="session")
def classifier(config):
    """A model with a classifier, and parameters whose norms and biases are not trivial."""
    model = bert(config, head="classifier")
    return model, noisy(jax.jit(model.init)(jax.random.key(0)))
