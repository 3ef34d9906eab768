"""A tiny T5 and a batch with padding on both sides, for the tests of T5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.models.t5 import t5
from peftjax.models.t5_config import read_config

VALUES = {
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}


def values(**changes):
    return {**VALUES, **changes}


@functools.cache
def make(head="seq2seq_lm", **changes):
    """A model and parameters none of which are trivial."""
    model = t5(read_config(values(**changes)), head=head)
    rng = np.random.default_rng(0)
    shapes = model.shapes

    def draw(leaf):
        ones = leaf.ndim < 3 and leaf.shape[-1] == 16 and leaf.shape[0] != 40
        return jnp.asarray(ones + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return model, jax.tree.map(draw, shapes)


def token_batch(length=9, target=5, seed=0, left=False):
    """Two texts, the second shorter, each with one eos (1) at its end; targets for the decoder."""
    rng = np.random.default_rng(seed)
    places = np.arange(length)
    mask = (places < np.array([[length], [length // 2]])).astype(np.int32)
    ids = rng.integers(2, 40, (2, length)).astype(np.int32)
    ids[[0, 1], mask.sum(1) - 1] = 1
    ids = ids * mask
    if left:
        ids, mask = (np.stack([x[0], np.roll(x[1], length - length // 2)]) for x in (ids, mask))
    targets = rng.integers(2, 40, (2, target)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}
