"""Functions with derivative rules of their own that close over constants, and what they are told."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint
from support import KEY, all_but_slow, assert_close, noisy, normal

import peftjax as pj

W, X = 0.3 * normal(KEY, (8, 8)), normal(KEY, (4, 8))
CONSTANT = jnp.linspace(1.0, 2.0, 8)
METHOD = pj.lora(rank=2, targets=".*")
FROZEN, TRAINABLE = METHOD.init(KEY, {"w": W})
TRAINABLE = noisy(TRAINABLE)


@jax.custom_vjp
def kept(w, x):
    return (x * CONSTANT) @ w


kept.defvjp(
    lambda w, x: ((x * CONSTANT) @ w, (w, x)),
    lambda r, g: ((r[1] * CONSTANT).T @ g, 3.0 * (g @ r[0].T) * CONSTANT),
)


@jax.custom_jvp
def moved(w, x):
    return (x * CONSTANT) @ w


@moved.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return moved(w, x), 3.0 * (dx * CONSTANT) @ w + (x * CONSTANT) @ dw


def solved(w, x):
    diffrax = pytest.importorskip("diffrax")
    term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(y @ w))
    out = diffrax.diffeqsolve(term, diffrax.Heun(), 0.0, 0.5, 0.25, x, args=w, max_steps=4)
    return out.ys[-1]


def looped(w, x):
    def body(state):
        return state[0] + 1, jnp.tanh(state[1] @ w)

    return eqx.internal.while_loop(lambda s: s[0] < 3, body, (0, x), max_steps=4, kind="checkpointed")[1]


FUNCTIONS = {
    "vjp": kept,
    "vjp in a scan": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(kept(w, c)), None), x, length=2)[0],
    "vjp in jit": jax.jit(kept),
    "vjp in remat": jax.checkpoint(kept),
    "jvp": moved,
    "jvp in a scan": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(moved(w, c)), None), x, length=2)[0],
    "odeint": lambda w, x: odeint(lambda y, s, w: jnp.tanh(y @ w), x, jnp.array([0.0, 0.5]), w)[-1],
    "equinox's loop": looped,
    "diffrax": solved,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(FUNCTIONS, FUNCTIONS.keys() - {"diffrax"}))
def test_a_rule_that_closes_over_a_constant_gives_the_same_gradients(name):
    fn = FUNCTIONS[name]

    def gradients(product):
        return jax.grad(lambda t, x: jnp.sum(jnp.sin(product(t, x))), (0, 1))(TRAINABLE, X)

    wanted = gradients(lambda t, x: fn(METHOD.merge(FROZEN, t)["w"], x))
    assert_close(gradients(lambda t, x: pj.adapt(fn)(METHOD.apply(FROZEN, t)["w"], x)), wanted, 1e-4)


def test_a_vjp_rule_is_told_which_inputs_are_differentiated_and_which_results_matter():
    told = []

    @jax.custom_vjp
    def fn(w, x):
        return x @ w, x

    def forward(w, x):
        told.append((w.perturbed, x.perturbed))
        return (x.value @ w.value, x.value), (w.value, x.value)

    def backward(kept, cotangents):
        told.append(type(cotangents[1]).__name__)
        return kept[1].T @ cotangents[0], cotangents[0] @ kept[0].T

    fn.defvjp(forward, backward, symbolic_zeros=True)

    def loss(t, x):
        return jnp.sum(pj.adapt(fn)(METHOD.apply(FROZEN, t)["w"], x)[0])

    jax.grad(loss)(TRAINABLE, X)
    assert told == [(True, False), "SymbolicZero"]
    told.clear()
    jax.grad(loss, 1)(TRAINABLE, X)
    assert told == [(False, True), "SymbolicZero"]


def test_a_jvp_rule_is_told_which_inputs_stand_still():
    told = []
    fn = jax.custom_jvp(lambda w, x: x @ w)

    def rule(primals, tangents):
        (w, x), zeros = primals, [type(t).__name__ == "SymbolicZero" for t in tangents]
        told.append(zeros)
        return x @ w, x @ tangents[0]

    fn.defjvp(rule, symbolic_zeros=True)
    got = jax.grad(lambda t: jnp.sum(pj.adapt(fn)(METHOD.apply(FROZEN, t)["w"], X)))(TRAINABLE)
    assert told[-1] == [False, True]
    assert_close(got, jax.grad(lambda t: jnp.sum(X @ METHOD.merge(FROZEN, t)["w"]))(TRAINABLE), 1e-5)
