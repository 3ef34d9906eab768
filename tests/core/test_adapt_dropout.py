"""Every use of one weight drops out its input by another mask, and by the same when it is recomputed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import quick_at

import peftjax as pj

N = 32
X = jnp.ones((3, N))
METHODS = [pj.lora(rank=2, dropout=0.5), pj.dora(rank=2, dropout=0.5), pj.snell(rank=2, dropout=0.5)]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def dropped(method=METHODS[0], shape=(N, N)):
    params = {"w": jnp.zeros(shape)}
    frozen, trainable = method.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda t: t + jnp.linspace(0.1, 1.0, t.size).reshape(t.shape), trainable)
    return method.apply(frozen, trainable, key=jax.random.key(1))


def differ(*results):
    return all(not np.allclose(a, b) for n, a in enumerate(results) for b in results[n + 1 :])


def shared_function(p, x):
    block = jax.jit(lambda w, x: (x @ w, x @ w))
    return (*block(p["w"], x), *block(p["w"], x), x @ p["w"])


def both_branches(p, x):
    return lax.cond(True, lambda w: x @ w, lambda w: x @ w + 1, p["w"]), x @ p["w"]


def scan_of_constant(p, x):
    def step(c, r):
        return c, (r @ p["w"], lax.scan(lambda c, _: (c, r @ p["w"]), 0, length=2)[1])

    one, two = lax.scan(step, 0, jnp.stack([x, x]))[1]
    return *one, *two.reshape(-1, *x.shape), x @ p["w"]


def scan_of_carry(p, x):
    return lax.scan(lambda w, r: (w, r @ w), p["w"], jnp.stack([x, x, x]))[1]


def while_loop(p, x):
    def step(state):
        n, out = state
        return n + 1, out.at[n].set(x @ p["w"])

    return lax.while_loop(lambda s: s[0] < 3, step, (0, jnp.zeros((3, *x.shape))))[1]


USES = {
    "twice": lambda p, x: (x @ p["w"], x @ p["w"], x @ p["w"]),
    "shared jitted function": shared_function,
    "as two operands": lambda p, x: jax.jit(lambda v, w: (x @ v, x @ w))(p["w"], p["w"]),
    "checkpointed": lambda p, x: (
        jax.checkpoint(jnp.matmul)(x, p["w"]),
        jax.checkpoint(jnp.matmul)(x, p["w"]),
    ),
    "branch and after": both_branches,
    "scan": scan_of_constant,
    "carry": scan_of_carry,
    "while": while_loop,
    "vmap inside": lambda p, x: jax.vmap(lambda r: r @ p["w"])(x),
}


@each_method
@pytest.mark.parametrize("use", quick_at(USES.values(), every=6), ids=USES)
def test_every_use_of_a_weight_has_a_mask_of_its_own(method, use):
    assert differ(*pj.adapt(use)(dropped(method), X))


@pytest.mark.slow
@each_method
def test_every_example_of_a_vmap_around_the_adapted_function_has_a_mask_of_its_own(method):
    params = dropped(method)
    one = pj.adapt(lambda p, x: x @ p["w"])
    assert differ(*jax.vmap(one, in_axes=(None, 0))(params, X))
    nested = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(None, 0))(params, jnp.stack([X, X]))
    assert differ(*nested.reshape(-1, N))
    per_example = jax.vmap(jax.grad(lambda x: jnp.sum(one(params, x) ** 2)))(X)
    assert differ(*per_example)


@each_method
def test_the_experts_of_a_stack_are_dropped_out_too(method):
    params = dropped(method, (3, N, N))
    for use in (
        lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]),
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 1, 1])),
    ):
        assert pj.adapt(use)(params, X).shape[-1] == N


@pytest.mark.slow
@each_method
@pytest.mark.parametrize("around", [jax.checkpoint, jax.jit, lambda f: f], ids=["remat", "jit", "plain"])
def test_backward_makes_the_masks_of_forward_again(method, around):
    # The product is linear in x: its derivative along x is the product itself, if the masks are the same.
    params, x = dropped(method), jnp.linspace(1.0, 2.0, 3 * N).reshape(3, N)

    def model(p, x):
        h = lax.scan(lambda h, _: (h @ p["w"] / N, None), x, length=2)[0]
        return jax.checkpoint(jnp.matmul)(h @ p["w"], p["w"])

    def loss(x):
        return jnp.sum(around(pj.adapt(model))(params, x))

    value, gradient = jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(value, jnp.vdot(gradient, x), rtol=1e-4)
