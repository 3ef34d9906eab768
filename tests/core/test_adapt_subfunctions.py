"""A jitted or checkpointed block inside the traced function is evaluated once, however often it is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import compat

LAYERS = 6


def layers(key=0):
    keys = jax.random.split(jax.random.key(key), LAYERS)
    return {f"layer_{n}": {"kernel": jax.random.normal(k, (4, 4)) / 2} for n, k in enumerate(keys)}


def stack(block):
    def model(params, x):
        for n in range(LAYERS):
            x = block(params[f"layer_{n}"]["kernel"], x)
        return x

    return model


def adapted(params, rank=2):
    method = pj.lora(rank=rank, targets="all-linear")
    frozen, trainable = method.init(jax.random.key(1), params)
    return method, frozen, jax.tree.map(lambda t: t + 0.1, trainable)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_layers_of_one_structure_are_one_function(wrap):
    params, x = layers(), jnp.ones((3, 4))
    method, frozen, trainable = adapted(params)
    model = stack(wrap(lambda w, x: jnp.tanh(x @ w)))

    def run(trainable):
        return pj.adapt(model)(method.apply(frozen, trainable), x)

    called, _ = compat.open_jaxpr(jax.make_jaxpr(run)(trainable))
    inner = [eqn.params["jaxpr"] for eqn in called.eqns if "jaxpr" in eqn.params]
    assert len(inner) == LAYERS
    assert len({id(jaxpr) for jaxpr in inner}) == 1
    np.testing.assert_allclose(run(trainable), model(method.merge(frozen, trainable), x), atol=1e-6)


def test_layers_of_other_ranks_are_other_functions_with_the_right_values():
    params, x = layers(), jnp.ones((3, 4))
    method = pj.lora(rank=2, targets="all-linear", rank_pattern={"layer_3/kernel": 1})
    frozen, trainable = method.init(jax.random.key(1), params)
    trainable = jax.tree.map(lambda t: t + 0.1, trainable)
    model = stack(jax.jit(lambda w, x: jnp.tanh(x @ w)))
    out = pj.adapt(model)(method.apply(frozen, trainable), x)
    np.testing.assert_allclose(out, model(method.merge(frozen, trainable), x), atol=1e-6)


def test_an_error_within_a_shared_block_names_the_parameter_of_its_own_call():
    params, x = layers(), jnp.ones((3, 4))
    block = jax.jit(lambda w, x: x @ jnp.sort(w))
    method = pj.lora(rank=2, targets=["layer_4/kernel"])
    frozen, trainable = method.init(jax.random.key(1), params)
    run = method.apply(frozen, trainable)
    with pytest.raises(pj.PeftError, match="layer_4/kernel: 'sort'"):
        pj.adapt(stack(block))(run, x)
    allowed = pj.adapt(stack(block), allow_dense=["layer_4/.*"])(run, x)
    np.testing.assert_allclose(allowed, stack(block)(method.merge(frozen, trainable), x), atol=1e-6)


def test_a_weight_that_a_jitted_function_gives_back_has_its_name():
    params, x = layers(), jnp.ones((3, 4))
    view = jax.jit(lambda w: w.T)
    method, frozen, trainable = adapted(params)
    with pytest.raises(pj.PeftError, match="layer_0/kernel: 'sort'"):
        pj.adapt(stack(lambda w, x: x @ jnp.sort(view(w))))(method.apply(frozen, trainable), x)
