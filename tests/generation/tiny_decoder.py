"""A tiny random Llama, and greedy continuation without a cache."""

import dataclasses

import jax
import numpy as np

from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config

VOCABULARY = 61
VALUES = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
PROMPTS = [[3, 14, 15, 9, 26, 5, 35], [8, 9, 7], [20, 1, 8, 28, 1]]


def make_decoder(*, dtype="float32", per_layer=None, **block):
    """A model whose block differs from Llama's, and its parameters."""
    config = read_config(VALUES)
    config = dataclasses.replace(config, block=dataclasses.replace(config.block, **block))
    model = dataclasses.replace(decoder(config, dtype=dtype), per_layer=per_layer or {})
    return model, jax.jit(model.init)(jax.random.key(0))


def padded(prompts, side="left", width=None):
    """A batch of prompts with padding (id 0) on one side."""
    width = width or max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def without_cache(model, params, prompts, count):
    """Greedy tokens [B, count] by a whole forward pass each, and the smallest lead of a winner.

    Rows begin in the first column, and what stands to the right of a token cannot change its logits.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = padded(prompts, "right", lengths.max() + count)["input_ids"]
    rows = np.arange(len(prompts))
    forward = jax.jit(lambda params, ids, at: model(params, {"input_ids": ids}).at(at).dense()[:, 0])
    leads = []
    for made in range(count):
        logits = np.asarray(forward(params, ids, lengths - 1 + made), np.float32)
        best = np.sort(logits, axis=-1)
        leads.append((best[:, -1] - best[:, -2]).min())
        ids[rows, lengths + made] = logits.argmax(-1)
    return np.stack([ids[row, n : n + count] for row, n in enumerate(lengths)]), min(leads)
