"""What methods train of a model, and that training it leaves the caller's arrays alone."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import peftjax as pj
from peftjax.transform.inspection import adapted_line, inspection


def methods():
    return {
        "full": pj.full(),
        "unfreeze": pj.unfreeze(".*(kernel|bias)"),
        "bitfit": pj.bitfit(),
        "lora": pj.lora(rank=2, bias="all"),
        "galore": pj.galore(rank=2),
        "restarts": pj.lowrank_restarts(rank=2, every=10),
        "chain": pj.chain(pj.lora(rank=2, targets=["up"]), pj.unfreeze(["head"])),
    }


@pytest.mark.parametrize("name", methods())
def test_donating_the_trainable_leaves_params_and_frozen_alive(name):
    key = jax.random.key(0)
    params = {"up": {"kernel": jax.random.normal(key, (8, 8)), "bias": jnp.zeros(8)}}
    params["head"] = {"kernel": jnp.ones((8, 8))}
    frozen, trainable = methods()[name].init(key, params)
    held = [leaf for leaf in jax.tree.leaves((params, frozen)) if isinstance(leaf, jax.Array)]
    jax.jit(lambda t: jax.tree.map(lambda x: x, t), donate_argnums=0)(trainable)
    assert not any(leaf.is_deleted() for leaf in held)


@pytest.mark.parametrize("name", ["full", "bitfit", "lora", "galore"])
def test_an_equinox_module_with_functions_is_adapted_as_it_is(name):
    model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    method = pj.full() if name == "full" else methods()[name]
    frozen, trainable = method.init(jax.random.key(1), model)
    frozen = replace(frozen, advanced=True)
    x = jnp.ones(4)
    assert jnp.allclose(pj.adapt(lambda m, x: m(x))(method.apply(frozen, trainable), x), model(x), atol=1e-6)
    merged = method.merge(frozen, trainable, safe=True)
    assert merged.activation is model.activation


def test_batch_statistics_of_nnx_are_not_trained():
    norm = nnx.state(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    assert sorted(pj.full().init(jax.random.key(0), norm)[1]) == ["bias", "scale"]
    assert sorted(pj.freeze(["bias"]).init(jax.random.key(0), norm)[1]) == ["scale"]


def test_biases_of_haiku_are_trained():
    params = {"linear": {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}}
    assert sorted(pj.bitfit().init(jax.random.key(0), params)[1]) == ["linear/b"]
    for bias in ("all", "adapted"):
        assert "linear/b" in pj.lora(rank=2, bias=bias).init(jax.random.key(0), params)[1]


def test_the_report_names_every_matrix_that_is_left_out_with_the_reason():
    w = jnp.ones((4, 4))
    params = {"up": {"kernel": w}, "ids": w.astype(jnp.int32), "head": {"kernel": w}, "act": jax.nn.relu}
    params["word"] = {"embedding": w}
    rows = inspection(pj.lora(rank=2), params)["parameters"]
    assert {row["parameter"]: row.get("why") for row in rows} == {
        "up/kernel": None,
        "head/kernel": "in the output layer 'head'",
        "word/embedding": "a lookup table",
        "ids": "it is int32, and methods train real floating-point numbers",
    }
    method = pj.lora(rank=2)
    line = adapted_line(method, params, *method.init(jax.random.key(0), params))
    assert line.startswith("weights adapted: 1; matrices left as they are: ")
    assert "head/kernel: in the output layer 'head'" in line
