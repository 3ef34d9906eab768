"""Training with methods beside a frozen backbone, interrupted and continued."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

import peftjax as pj
from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.train.output_folder import run_identity

SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
METHODS = (pj.vqt(num_queries=2, passes=2), pj.unipt(), pj.sherl())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_that_was_interrupted_is_a_run_in_one_piece(tmp_path, method):
    config = BertConfig(vocab_size=30, max_position_embeddings=32, labels=("a", "b", "c"), **SIZES)
    model = bert(config, head="classifier")
    params = jax.jit(model.init)(jax.random.key(0))
    frozen, trainable = method.init(jax.random.key(0), params)
    options = {"frozen": frozen, "trainable": trainable, "method": method, "held_out": None}
    options |= {"forward": method.model(model), "identity": run_identity(method.config, params)}
    config = replace(tiny.CONFIG, schedule="constant", warmup_ratio=0.0, steps=6, keep_best=0)
    tiny.run(tmp_path, replace(config, steps=3), **options)
    continued = tiny.run(tmp_path, config, **options)
    whole = tiny.run(config=config, **options)
    jax.tree.map(np.testing.assert_array_equal, continued.trainable, whole.trainable)
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), whole.trainable, trainable)
    assert sum(jax.tree.leaves(moved)) >= len(jax.tree.leaves(moved)) - 2  # SHERL's shares may stay silent
