"""Tiny models of the families, with numbers that are far from trivial, and a batch of each."""

import functools

import jax
import numpy as np

from peftjax.models.families import FAMILIES

TEXT = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS = {
    "llama": {**GROUPED, "attention_bias": True, "mlp_bias": True},
    "qwen3": {**GROUPED, "head_dim": 6},
    "gemma2": {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3},
    "gpt2": {"vocab_size": 31, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 16, "n_inner": 12},
    "opt": {**TEXT, "ffn_dim": 12, "word_embed_proj_dim": 16},
    "bert": {**TEXT, "type_vocab_size": 2},
    "vit": {**TEXT, "image_size": 8, "patch_size": 4, "num_channels": 2},
    "t5": {
        "vocab_size": 31,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 12,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    },
    "mixtral": {**GROUPED, **EXPERTS, "tie_word_embeddings": True},
    "gpt_oss": {
        **GROUPED,
        **EXPERTS,
        "head_dim": 6,
        "sliding_window": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen3_moe": {
        **GROUPED,
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
}


@functools.cache
def make(name):
    """A model without a head, and its parameters."""
    family = FAMILIES[name]
    model = family.build(family.read_config({"model_type": name, **SETTINGS[name]}), head="none")
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), model.shapes)


def batch_of(name):
    rng = np.random.default_rng(1)
    if name == "vit":
        return {"pixel_values": rng.normal(size=(2, 2, 8, 8)).astype(np.float32)}
    mask = (np.arange(7) < np.array([[7], [4]])).astype(np.int32)
    batch = {"input_ids": rng.integers(2, 31, (2, 7)).astype(np.int32) * mask, "attention_mask": mask}
    return {**batch, "decoder_input_ids": batch["input_ids"][:, :5]} if name == "t5" else batch
