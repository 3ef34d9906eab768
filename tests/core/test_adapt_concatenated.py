"""Weights that a model concatenates or stacks before it uses them: equal to the merged model, and thin."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import KEY, assert_close, assert_equals_merged, assert_no_dense_gradient, normal, quick_at

import peftjax as pj

D = 8
X = normal(KEY, (4, D))
KEYS = jax.random.split(KEY, 4)
TRIO = {name: normal(key, (D, D)) for name, key in zip("abc", KEYS)}
SQUARE = {name: TRIO[name] for name in "ab"}
TABLES = {"a": normal(KEY, (10, 6)), "b": normal(KEYS[1], (3, 6))}
KERNELS = {"a": normal(KEY, (3, D, 5)), "b": normal(KEYS[1], (3, D, 4))}
EXPERTS = {"a": normal(KEY, (2, D, 5)), "b": normal(KEYS[1], (2, D, 5))}
IDS = jnp.array([[0, 9], [10, 12]])
SERIES = normal(KEY, (2, 6, D))


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def both(p, axis=0):
    return jnp.concatenate([p["a"], p["b"]], axis)


def halves(p, x):
    left, right = jnp.split(x @ both(p, 1), 2, axis=-1)
    return jnp.tanh(left) * right


USES = {
    "outputs": (SQUARE, halves, X),
    "inputs": (SQUARE, lambda p, x: jnp.concatenate([x, -x], -1) @ both(p), X),
    "a plain part": (
        SQUARE,
        lambda p, x: x @ jnp.concatenate([p["a"], np.eye(D, dtype=np.float32), p["b"]], 1),
        X,
    ),
    "transposed": (SQUARE, lambda p, x: x @ both(p).T, X),
    "cut again": (SQUARE, lambda p, x: x @ both(p, 1)[:, D - 2 : D + 3] @ both(p, 1)[:5, 1 : 2 * D : 2], X),
    "as heads": (SQUARE, lambda p, x: jnp.einsum("bd,dhk->bhk", x, both(p, 1).reshape(D, 4, 4)), X),
    "flipped": (SQUARE, lambda p, x: x @ both(p, 1)[:, ::-1], X),
    "in a loop": (
        SQUARE,
        lambda p, x: lax.scan(lambda c, _: (jnp.tanh(halves(p, c)), None), x, length=2)[0],
        X,
    ),
    "into a loop and a jit": (
        SQUARE,
        lambda p, x: (
            lambda w: lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, w)[:, 2 : D + 2], None), x, length=2)
        )(both(p, 1))[0],
        X,
    ),
    "weight first": (SQUARE, lambda p, x: jnp.einsum("bd,de->eb", x, both(p, 1)), X),
    "rows of two tables": (TABLES, lambda p: both(p)[IDS], ()),
    "tied tables": (TABLES, lambda p: both(p)[IDS] @ both(p).T, ()),
    "channels": (KERNELS, lambda p, x: conv(x, both(p, 2)), SERIES),
    "stacked and scanned": (
        TRIO,
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([p[n] for n in "abc"]))[0],
        X,
    ),
    "stacked as experts": (
        SQUARE,
        lambda p, x: jnp.einsum("td,edf->tef", x, jnp.stack([p["a"], p["b"], p["a"]])),
        X,
    ),
    "stacked behind": (SQUARE, lambda p, x: jnp.einsum("td,dfe->tef", x, jnp.stack([p["a"], p["b"]], -1)), X),
    "more experts": (EXPERTS, lambda p, x: lax.ragged_dot(x, both(p), jnp.array([1, 0, 2, 1])), X),
    "wider experts": (EXPERTS, lambda p, x: lax.ragged_dot(x, both(p, 2), jnp.array([1, 3])), X),
}
LAYOUTS = {"channels": {".*": "iio"}}


@pytest.mark.parametrize("name", quick_at(USES, every=3))
def test_what_is_put_together_acts_part_by_part(name):
    params, use, x = USES[name]
    method = pj.lora(rank=2, targets=".*", layouts=LAYOUTS.get(name))
    inputs = (x,) if len(x) else ()
    assert_equals_merged(use, params, method, *inputs, tolerance=1e-4)
    assert_no_dense_gradient(use, params, method, *inputs)


def test_parts_of_other_ranks_and_methods_act_for_themselves():
    method = pj.lora(rank=2, targets=".*", rank_pattern={"b": 3})
    assert_equals_merged(lambda p, x: x @ both(p, 1), SQUARE, method, X)
    dora = pj.dora(rank=2, targets="a", layouts={"a": "io"})
    frozen, trainable = dora.init(KEY, SQUARE)
    trainable = jax.tree.map(lambda t: t + 0.1, trainable)
    got = pj.adapt(lambda p: X @ both(p, 1))(dora.apply(frozen, trainable))
    assert_close(got, X @ both(dora.merge(frozen, trainable), 1))


@pytest.mark.slow
def test_the_fused_cells_of_flax():
    module = nn.RNN(nn.OptimizedLSTMCell(5))
    params = module.init(KEY, SERIES)["params"]

    def forward(p, x):
        return module.apply({"params": p}, x)

    assert_equals_merged(forward, params, pj.lora(rank=2, targets=".*kernel"), SERIES)


def test_whoever_accepts_the_dense_array_gets_it():
    method = pj.lora(rank=2, targets=".*")
    frozen, trainable = method.init(KEY, SQUARE)
    run = pj.adapt(lambda p: jnp.linalg.norm(both(p)), allow_dense=["concatenate"])
    assert_close(run(method.apply(frozen, trainable)), jnp.linalg.norm(both(SQUARE)))
