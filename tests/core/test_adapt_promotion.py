"""Activations that are no floats: products with a weight promote as they do with its dense array."""

import jax
import jax.numpy as jnp
import pytest
from support import KEY, assert_close, normal, quick_at

import peftjax as pj
from peftjax.weights.batched_low_rank import BatchedLowRank
from peftjax.weights.column_normalized import ColumnNormalized, column_squares
from peftjax.weights.factored import Factored
from peftjax.weights.kernelized import Kernelized
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank
from peftjax.weights.rows import TrainedRows
from peftjax.weights.scaled import Scaled
from peftjax.weights.sparse_entries import SparseEntries

LAYOUT = Layout.parse("io", (8, 5), "w")
W, A, B = (0.3 * normal(k, s) for k, s in zip(jax.random.split(KEY, 3), ((8, 5), (2, 8), (2, 5))))
X = jax.random.randint(KEY, (4, 8), 0, 3)
LOW_RANK = LowRank(W, A, B, LAYOUT)
PLACES = jnp.array([1, 3])
WEIGHTS = {
    "low rank": LOW_RANK,
    "without a base": Factored(A, B, LAYOUT, jnp.float32),
    "scaled": ColumnNormalized(LOW_RANK, jnp.full(5, 1.5), column_squares(W, LAYOUT), LAYOUT),
    "shrunk": Scaled(W, jnp.float32(0.7), LAYOUT),
    "rows": TrainedRows(W, B, PLACES, LAYOUT, 0.5),
    "sparse": SparseEntries(W, 0.3 + jnp.arange(2.0), PLACES, PLACES, LAYOUT),
    "kernelized": pj.snell(rank=2),
}


def weight_of(kind):
    if not isinstance(WEIGHTS[kind], pj.Transform):
        return WEIGHTS[kind]
    frozen, trainable = WEIGHTS[kind].init(KEY, {"w": W})
    trainable = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), trainable)
    weight = WEIGHTS[kind].apply(frozen, trainable)["w"]
    assert isinstance(weight, Kernelized)
    return weight


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("kind", quick_at(WEIGHTS, every=3))
def test_a_product_promotes_and_trains_the_parts(kind, dtype):
    weight, x = weight_of(kind), X.astype(dtype)

    def loss(product):
        return lambda w: jnp.sum(jnp.sin(product(w)))

    def gradients(product):
        return jax.grad(loss(product), allow_int=True)(weight)

    def adapted(w):
        return pj.adapt(lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32))(w, x)

    def merged(w):
        return x.astype(jnp.float32) @ w.dense()

    assert_close(adapted(weight), merged(weight), 1e-5)
    parts = [
        (got, want)
        for got, want in zip(jax.tree.leaves(gradients(adapted)), jax.tree.leaves(gradients(merged)))
        if jnp.issubdtype(got.dtype, jnp.floating)
    ]
    for got, want in parts:
        assert_close(got, want, 1e-4)
    assert any(float(jnp.abs(want).max()) > 0 for _, want in parts)


def test_the_other_side_and_every_row_promote_too():
    weight = LOW_RANK
    other = jnp.arange(10).reshape(2, 5) % 2 == 0
    assert_close(pj.adapt(lambda w, x: x @ w.T)(weight, other), other @ weight.dense().T, 1e-5)
    mixed = BatchedLowRank(W, A[None], B[None], jnp.zeros(4, jnp.int32), LAYOUT)
    assert_close(pj.adapt(lambda w, x: x @ w)(mixed, X), X @ weight.dense(), 1e-5)


def test_integers_beyond_bfloat16_keep_their_value_in_a_product_that_asks_for_float32():
    weight, x = LOW_RANK.cast(jnp.bfloat16), jnp.full((1, 8), 1001)
    got = pj.adapt(lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32))(weight, x)
    a, b, base = (part.astype(jnp.float32) for part in (weight.a, weight.b, weight.base))
    assert_close(got, x @ (base + a.T @ b), 1e-2)
