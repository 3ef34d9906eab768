"""RePaViT: idle features against their definition, and the merged feed-forward against the whole one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, quick_at
from tiny_models import tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.methods.residuals.repavit import active_features

MODELS = ("encoder", "backbone")


def outputs(model, params, batch):
    return jax.jit(pj.adapt(model))(params, batch)


def idle_outputs(name, share):
    """What the model gives with idle features."""
    case = tiny(name)
    method = pj.chain(pj.full(), pj.repavit(idle=share))
    frozen, trainable = method.init(jax.random.key(0), case.params)
    plain = pj.full()
    assert_close(plain.merge(plain.init(jax.random.key(0), case.params)[0], trainable["full"]), case.params)
    return outputs(method.model(case.forward), method.apply(frozen, trainable), case.batch)


@pytest.mark.parametrize(
    ("name", "share"), quick_at([(n, s) for n in MODELS for s in (0.5, 0.0, 0.75, 1.0)], 0)
)
def test_the_merged_model_gives_the_same(name, share):
    case = tiny(name)
    got = idle_outputs(name, share)
    model, params = pj.repavit_merged(case.forward, case.params, idle=share)
    assert_close(outputs(model, params, case.batch), got, 1e-4)
    plain = case.compiled(case.params, case.batch)
    assert (np.abs(np.asarray(got - plain)).max() < 1e-5) == (share == 0.0)
    whole, own = (tree.named_leaves(p["blocks"]["feed_forward"]) for p in (case.params, params))
    layers, width, features = whole["up/kernel"].shape
    count = max(1, active_features(features, share))
    kernels = sum(leaf.size for path, leaf in own.items() if path.endswith("kernel"))
    assert kernels == layers * (width**2 + (3 if "gate/kernel" in own else 2) * width * count)


def test_idle_features_enter_the_way_down_as_they_are():
    case = tiny("encoder")
    block, width = case.forward.block, case.forward.block.config.width
    config = dataclasses.replace(block.config, idle=True)
    layer = jax.tree.map(lambda leaf: leaf[0], case.params["blocks"])
    part = layer["feed_forward"]
    idle = jnp.arange(12) % 3 == 0  # wherever they are
    layer = {**layer, "feed_forward": {**part, "idle": idle}}
    x = jax.random.normal(jax.random.key(0), (2, 4, width))
    run = block.clone(config=config)
    got = run.apply({"params": layer}, x, method="feed_forward_branch")
    inner = x @ part["up"]["kernel"] + part["up"]["bias"]
    mixed = jnp.where(idle, inner, jax.nn.gelu(inner, approximate=False))
    assert_close(got, mixed @ part["down"]["kernel"] + part["down"]["bias"], 1e-5)


def test_what_does_not_fit_says_so():
    with pytest.raises(pj.PeftError, match=r"repavit: idle must be in \[0, 1\], got 1.5"):
        pj.repavit(idle=1.5)
    with pytest.raises(pj.PeftError, match="experts"):
        pj.repavit().init(jax.random.key(0), tiny("experts").params)
    with pytest.raises(pj.PeftError, match="coded residuals"):
        pj.coded_residuals().model(pj.repavit().model(tiny("encoder").forward))
