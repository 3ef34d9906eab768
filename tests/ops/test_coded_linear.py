"""Products whose weight's gradient is taken at codes of the input, and functions recomputed from codes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from support import KEY, assert_close, normal

import peftjax as pj
from peftjax.ops.coded.linear import Input, product_at
from peftjax.ops.coded.recompute import recomputed_from_codes
from peftjax.planner.residuals import kept_arrays
from peftjax.quantize import decode
from peftjax.quantize.affine import encode

X = normal(KEY, (7, 64))
PARAMS = {"up": {"kernel": normal(KEY, (64, 48)), "bias": jnp.ones(48)}}
SEEN = decode(encode(X, 4))


def layer(params, x):
    x = Input(x, Partial(decode, encode(x, 4)))
    product = jax.checkpoint(lambda x, w: product_at(x, w, jnp.matmul), prevent_cse=False)
    return product(x, params["up"]["kernel"]) + params["up"]["bias"]


def kept(method):
    frozen, trainable = method.init(KEY, PARAMS)

    def out(trainable, frozen, x, one):
        return pj.adapt(layer)(method.apply(frozen, trainable), x * one)

    return [aval for aval in kept_arrays(out, trainable, frozen, X, jnp.ones(())) if aval.ndim == 2]


def test_value_is_exact_and_the_kernels_gradient_is_that_at_the_codes():
    g = jax.random.normal(KEY, (7, 48))
    y, pull = jax.vjp(layer, PARAMS, X)
    np.testing.assert_array_equal(y, X @ PARAMS["up"]["kernel"] + 1)
    grads, dx = pull(g)
    assert_close(grads["up"]["kernel"], SEEN.T @ g, 1e-6)
    assert_close(dx, g @ PARAMS["up"]["kernel"].T, 1e-6)
    np.testing.assert_array_equal(grads["up"]["bias"], g.sum(0))


def test_a_frozen_layer_keeps_nothing_and_a_trained_one_its_inputs_codes():
    assert kept(pj.bitfit()) == []
    codes = [((7, 32), "uint8"), ((7, 1), "bfloat16"), ((7, 1), "bfloat16")]
    for method in (pj.full(), pj.lora(rank=2), pj.dora(rank=2)):
        found = sorted((aval.shape, aval.dtype.name) for aval in kept(method))
        assert [item for item in found if item[0][0] == 7] == sorted(codes), method.name


def test_a_structured_weight_gets_the_gradients_of_the_decoded_input():
    method = pj.lora(rank=2)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    plain = lambda params, x: x @ params["up"]["kernel"] + params["up"]["bias"]
    total = lambda fn, x: jax.grad(lambda t: pj.adapt(fn)(method.apply(frozen, t), x).sum())(trainable)
    assert_close(total(layer, X), total(plain, SEEN), 1e-5)


def test_recomputed_from_codes():
    f = lambda x, y, rest: jnp.sin(x) * y * rest["scale"] + rest["number"]
    rest = {"scale": jnp.float32(2.0), "number": jnp.int32(1), "key": KEY}
    run = lambda x, y, scale: recomputed_from_codes(
        f, (x, y), (encode(x, 4), encode(y, 32)), ({**rest, "scale": scale},)
    )
    value, pull = jax.vjp(run, X, X + 1, rest["scale"])
    np.testing.assert_array_equal(value, f(X, X + 1, rest))
    at_codes = jax.vjp(lambda x, y, s: f(x, y, {**rest, "scale": s}), SEEN, X + 1, rest["scale"])[1]
    assert_close(pull(X), at_codes(X), 1e-6)
