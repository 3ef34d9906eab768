"""What adapters cost, as the compiler counts it: no dense gradient, nothing densified, nothing kept twice."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_no_dense_gradient, made_shapes

import peftjax as pj
from peftjax.core import tree

D, F, L, T, R = 64, 128, 3, 256, 8


def model(params, x, unroll=1):
    def block(x, layer):
        h = jnp.tanh(x @ layer["up"]["kernel"])
        return x + h @ layer["down"]["kernel"], None

    return lax.scan(block, x, params["blocks"], unroll=unroll)[0]


def by_hand(base, adapter, x):
    """The same step as a careful user would write it for this model alone."""

    def linear(x, w, ab):
        return x @ w + (x @ ab["a"].T) @ ab["b"]

    def block(x, layer):
        w, ab = layer
        h = jnp.tanh(linear(x, w["up"]["kernel"], ab["up"]))
        return x + linear(h, w["down"]["kernel"], ab["down"]), None

    return lax.scan(block, x, (base["blocks"], adapter), unroll=L)[0]


def unrolled(params, x):
    return model(params, x, unroll=L)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(KEY, 2)
    up, down = jax.random.normal(keys[0], (L, D, F)), jax.random.normal(keys[1], (L, F, D))
    return {"blocks": {"up": {"kernel": 0.1 * up}, "down": {"kernel": 0.1 * down}}}


def flops(fn, *args):
    # The compiler counts the body of a loop once: the programs compared are unrolled.
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_flops_are_those_of_a_hand_written_adapter(params):
    x = jnp.ones((T, D))
    method = pj.lora(rank=R, alpha=R)
    frozen, trainable = method.init(KEY, params)

    def loss(trainable, frozen, x):
        return jnp.sum(jnp.square(pj.adapt(unrolled)(method.apply(frozen, trainable), x)))

    def loss_by_hand(adapter, base, x):
        return jnp.sum(jnp.square(by_hand(base, adapter, x)))

    def loss_merged(trainable, frozen, x):
        return jnp.sum(jnp.square(unrolled(method.merge(frozen, trainable), x)))

    adapter = {name: trainable[f"blocks/{name}/kernel"] for name in ("up", "down")}
    ours = flops(jax.grad(loss), trainable, frozen, x)
    hand = flops(jax.grad(loss_by_hand), adapter, params, x)
    merged = flops(jax.grad(loss_merged), trainable, frozen, x)
    assert ours <= 1.02 * hand
    assert merged > 1.2 * ours  # the count does see a dense gradient


def test_the_step_makes_nothing_of_the_size_of_a_weight(params):
    method, x = pj.lora(rank=R), jnp.ones((T, D))
    assert_no_dense_gradient(model, params, method, x)
    frozen, trainable = method.init(KEY, params)
    merged = jax.make_jaxpr(jax.grad(lambda t: jnp.sum(model(method.merge(frozen, t), x))))(trainable)
    assert (D, F) in set(made_shapes(merged.jaxpr))  # the check does see a dense gradient


def kept(fn, *args):
    """Bytes that the forward pass leaves for the backward pass."""
    _, pull = jax.vjp(fn, *args)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize("method", [pj.lora(rank=R), pj.lora(rank=R, dropout=0.5)], ids=["plain", "dropout"])
def test_one_linear_keeps_its_input_and_the_thin_product(method):
    params = {"kernel": jnp.ones((D, F))}
    x = jnp.ones((T, D))
    frozen, trainable = method.init(KEY, params)

    def run(trainable, x):
        weights = method.apply(frozen, trainable, key=KEY)
        return pj.adapt(lambda p, x: x @ p["kernel"])(weights, x)

    activations = T * D * 4 + T * R * 4
    weights = tree.nbytes(params) + tree.nbytes(trainable)
    assert kept(run, trainable, x) <= activations + weights + 64


def test_a_step_holds_no_second_copy_of_the_weights(params):
    x = jnp.ones((8, D))  # few tokens, so that weights, not activations, fill the memory
    method = pj.lora(rank=R)
    frozen, trainable = method.init(KEY, params)

    def temporaries(run):
        def loss(trainable, frozen, x):
            return jnp.sum(jnp.square(run(frozen, trainable, x)))

        compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries(lambda f, t, x: pj.adapt(model)(method.apply(f, t), x))
    merged = temporaries(lambda f, t, x: model(method.merge(f, t), x))
    assert ours < tree.nbytes(params)
    assert merged > tree.nbytes(params)


def test_frozen_parameters_have_no_gradient(params):
    method = pj.lora(rank=R, targets=["up"])
    frozen, trainable = method.init(KEY, params)
    grads = jax.grad(lambda t: jnp.sum(pj.adapt(model)(method.apply(frozen, t), jnp.ones((2, D)))))(trainable)
    assert list(grads) == ["blocks/up/kernel"]
