"""Trained rows and entries of weights in every layout: outputs and gradients of the dense weight."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, quick_at

import peftjax as pj
from peftjax.weights.indexing import NOWHERE
from peftjax.weights.layout import Layout
from peftjax.weights.rows import TrainedRows
from peftjax.weights.sparse_entries import SparseEntries

USES = {
    "io": ((6, 5), (4, 6), "bi,io->bo"),
    "oi": ((5, 6), (4, 6), "bi,oi->bo"),
    "io tied": ((6, 5), (4, 5), "bo,io->bi"),
    "iio": ((2, 3, 5), (4, 2, 3), "bhd,hdo->bo"),
    "ioo": ((6, 2, 5), (4, 6), "bi,ihd->bhd"),
    "oii": ((5, 2, 3), (4, 2, 3), "bhd,ohd->bo"),
    "oio": ((2, 6, 5), (4, 6), "bi,hid->bhd"),
    "soi": ((2, 5, 6), (2, 4, 6), "sbi,soi->sbo"),
    "sio": ((2, 6, 5), (4, 6), "bi,sio->bso"),
    "osi": ((5, 2, 6), (4, 2, 6), "bsi,osi->bso"),
}


def rows_weight(letters, shape, keys):
    layout = Layout.parse(letters, shape)
    rows = jnp.broadcast_to(jnp.array([1, 4, 5]), (*layout.stack, 3))
    rows = rows.at[..., 0].add(jnp.arange(rows.size // 3).reshape(layout.stack))  # not the same in all
    values = jax.random.normal(next(keys), (*rows.shape, layout.matrix[1]))
    return TrainedRows(jax.random.normal(next(keys), shape), values, rows, layout, scale=0.5)


def entries_weight(letters, shape, keys):
    layout = Layout.parse(letters, shape)
    rows = jnp.broadcast_to(jnp.array([0, 2, 2, 5, NOWHERE]), (*layout.stack, 5))
    columns = jnp.broadcast_to(jnp.array([4, 0, 3, 1, 0]), rows.shape)
    values = jax.random.normal(next(keys), rows.shape)
    return SparseEntries(jax.random.normal(next(keys), shape), values, rows, columns, layout, added=True)


def results(fn, weight, values, x):
    def total(values, x):
        out = pj.adapt(fn)(replace(weight, values=values), x)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(total, (0, 1), has_aux=True)(values, x)


def by_hand(fn, weight, values, x):
    def total(values, x):
        out = fn(replace(weight, values=values).dense(), x)
        return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(total, (0, 1), has_aux=True)(values, x)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [rows_weight, entries_weight])
def test_a_product_is_that_of_the_dense_weight(make, use, in_place):
    shape, x_shape, equation = USES[use]
    keys = iter(jax.random.split(KEY, 3))
    weight, x = make(use.split()[0], shape, keys), jax.random.normal(next(keys), x_shape)

    def fn(w, x):
        return jnp.einsum(equation, x, w)

    wanted = by_hand(fn, weight, weight.values, x)
    if in_place:
        weight = replace(weight, base=weight.dense(), in_place=True)
    assert_close(results(fn, weight, weight.values, x), wanted)


@pytest.mark.parametrize("make", [rows_weight, entries_weight])
@pytest.mark.parametrize(
    "fn",
    quick_at(
        [
            lambda w, x: x[:, 1:5] @ w[1:5],
            lambda w, x: x @ w[:, 1:4],
            lambda w, x: w[jnp.array([[0, 5], [1, 2]])] * x[0, 0],
            lambda w, x: w.T[jnp.array([0, 4])] * x[0, 0],
            lambda w, x: x @ w.reshape(6, 5, 1)[..., 0],
        ],
        0,
        2,
    ),
    ids=["inputs", "outputs", "lookup", "columns", "reshaped"],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_views_and_lookups(make, fn, in_place):
    keys = iter(jax.random.split(KEY, 3))
    weight, x = make("io", (6, 5), keys), jax.random.normal(next(keys), (4, 6))
    wanted = by_hand(fn, weight, weight.values, x)
    if in_place:
        weight = replace(weight, base=weight.dense(), in_place=True)
    assert_close(results(fn, weight, weight.values, x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("make", [rows_weight, entries_weight])
def test_a_convolution(make):
    keys = iter(jax.random.split(KEY, 3))
    weight = make("iio", (2, 3, 5), keys)  # a window of 2, 3 channels
    x = jax.random.normal(next(keys), (4, 7, 3))

    def fn(w, x):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    wanted = by_hand(fn, weight, weight.values, x)
    assert_close(results(fn, weight, weight.values, x), wanted)
    written = replace(weight, base=weight.dense(), in_place=True)
    assert_close(results(fn, written, weight.values, x), wanted)


def test_entries_are_added_in_float32_before_the_cast():
    keys = iter(jax.random.split(KEY, 3))
    weight = entries_weight("io", (6, 5), keys)
    weight = replace(weight, values=jnp.full(5, 1e-3))
    found = weight.cast(jnp.bfloat16).dense()
    np.testing.assert_array_equal(found, weight.dense().astype(jnp.bfloat16))
    half = replace(weight, base=weight.base.astype(jnp.bfloat16))
    wanted = half.base.astype(jnp.float32)[2, 0] + 1e-3
    assert half.dense()[2, 0] == wanted.astype(jnp.bfloat16)


def test_the_gradient_of_rows_is_summed_in_float32():
    weight = rows_weight("io", (6, 5), iter(jax.random.split(KEY, 2)))
    x = jax.random.normal(KEY, (4096, 6)).astype(jnp.bfloat16)

    def total(values):
        w = replace(weight, values=values)
        return jnp.sum(pj.adapt(lambda w, x: x @ w.astype(x.dtype))(w, x).astype(jnp.float32))

    found = jax.grad(total)(weight.values)
    wanted = 0.5 * np.asarray(x, np.float64)[:, weight.rows].sum(axis=0)[:, None]
    np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), rtol=1e-4)


def test_rows_are_as_exact_as_the_weight_that_a_model_computes_with():
    """In mixed precision too, rows that have not changed change nothing, and a merged weight is the same."""
    weight = rows_weight("io", (6, 5), iter(jax.random.split(KEY, 2)))
    x = jax.random.normal(KEY, (4, 6)).astype(jnp.bfloat16)
    fresh = replace(weight, values=2.0 * weight.base[weight.rows])

    def fn(w, x):
        return x @ w.astype(x.dtype)

    np.testing.assert_array_equal(pj.adapt(fn)(fresh, x), fn(weight.base, x))
    trained = replace(fresh, values=fresh.values + 1e-4)  # less than bfloat16 tells of most
    assert_close(pj.adapt(fn)(trained, x), fn(trained.dense(), x), 1e-2)


@pytest.mark.parametrize("make", [rows_weight, entries_weight])
@pytest.mark.parametrize(
    "cut",
    quick_at(
        [
            lambda w, x: x[:, 1:5] @ w[1:5],
            lambda w, x: x[:, 1::2] @ w[1::2],
            lambda w, x: x @ w[:, ::3],
            lambda w, x: x[:, :3] @ jnp.split(w, 2)[1],
        ],
        0,
        1,
    ),
)
def test_a_slice_has_the_rows_and_entries_that_lie_in_it(make, cut):
    keys = iter(jax.random.split(KEY, 3))
    weight, x = make("io", (6, 5), keys), jax.random.normal(next(keys), (4, 6))
    expected, found = (run(cut, weight, weight.values, x) for run in (by_hand, results))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
        np.testing.assert_allclose(a, b, atol=1e-5)
