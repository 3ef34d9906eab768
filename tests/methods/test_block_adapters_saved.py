"""A run of adapters inside the blocks, interrupted and continued, saved and loaded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_run
from support import assert_close
from tiny_models import moved, tiny

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.models.bert import bert
from peftjax.train.output_folder import run_identity


@pytest.mark.slow
def test_a_run_with_dropout_resumes_and_its_adapter_is_saved(tmp_path):
    sizes = {"vocab_size": 30, "max_position_embeddings": 32, "labels": ("a", "b", "c")}
    model = bert(dataclasses.replace(tiny("encoder").forward.config, **sizes), head="classifier")
    params = moved(jax.jit(model.init)(jax.random.key(1)))
    adapters = pj.mam(length=2, mlp_size=4, size=3, dropout=0.1, prefix_dropout=0.1)
    method = pj.chain(pj.lora(rank=2, targets=["query"]), adapters, pj.unfreeze(["classifier"]))
    frozen, trainable = method.init(jax.random.key(0), params)
    options = {"frozen": frozen, "trainable": trainable, "method": method, "forward": method.model(model)}
    options["identity"] = run_identity(method.config, params)
    config = dataclasses.replace(tiny_run.CONFIG, schedule="constant", warmup_ratio=0.0, steps=4, keep_best=0)
    config, options["held_out"] = dataclasses.replace(config, save_every=2, model_dropout=False), None
    tiny_run.run(tmp_path / "run", dataclasses.replace(config, steps=2), **options)
    continued = tiny_run.run(tmp_path / "run", config, **options)
    whole = tiny_run.run(config=config, **options)
    assert_close(continued.trainable, whole.trainable, 0)
    moved_by = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), whole.trainable, trainable)
    assert min(jax.tree.leaves(moved_by)) > 0
    save_adapter(tmp_path / "adapter", method, frozen, whole.trainable, seed=0)
    loaded = load_adapter(tmp_path / "adapter", params)
    assert_close(loaded.trainable, whole.trainable, 0)
    batch = {"input_ids": jnp.arange(8).reshape(2, 4)}
    outs = [
        pj.adapt(one.model(model))(one.apply(own, values), batch)
        for one, own, values in (
            (method, frozen, whole.trainable),
            (loaded.method, loaded.frozen, loaded.trainable),
        )
    ]
    np.testing.assert_array_equal(*outs)
