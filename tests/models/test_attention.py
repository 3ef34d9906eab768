"""Attention in blocks of rows equals the formula written out, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.models.attention import Visibility, _segments, attend

KEYS = jax.random.split(jax.random.key(0), 6)


def inputs(length, heads=4, kv_heads=2, width=8, batch=2):
    shapes = (
        (batch, length, heads, width),
        (batch, length, kv_heads, width),
        (batch, length, kv_heads, width),
    )
    return [jax.random.normal(key, shape) for key, shape in zip(KEYS, shapes)]


def written_out(query, key, value, allowed, scale=None, softcap=None, bias=0.0):
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * (scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(allowed, scores + bias, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def order(length, causal, window):
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    allowed = distance >= 0 if causal else np.ones((length, length), bool)
    return allowed & (distance < window) if window else allowed


def assert_same(ours, theirs, args):
    # No jit around: the blocks are compiled one by one and shared between the cases.
    probe = jax.random.normal(KEYS[4], args[0].shape)
    got = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(ours(*a) * probe), (0, 1, 2)))(*args)
    want = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(theirs(*a) * probe), (0, 1, 2)))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("length", "causal", "window"),
    [
        (1, True, None),
        (64, True, None),
        (65, True, 7),
        (130, False, None),
        (130, True, 70),
        (577, True, None),
    ],
)
def test_order_and_window(length, causal, window):
    args = inputs(length)
    visible = Visibility(causal, window)
    allowed = order(length, causal, window)
    assert_same(
        lambda q, k, v: attend(q, k, v, visible=visible), lambda q, k, v: written_out(q, k, v, allowed), args
    )


def test_mask_segments_softcap_bias_and_a_traced_window():
    length = 100
    args = inputs(length)
    mask = np.ones((2, length), bool)
    mask[0, :9] = mask[1, 80:] = False
    segments = np.repeat([[1, 2], [1, 3]], length // 2, axis=1)
    bias = jax.random.normal(KEYS[5], (1, 4, length, length))
    allowed = (
        order(length, True, 20) & mask[:, None, None] & (segments[:, :, None] == segments[:, None])[:, None]
    )
    seen = allowed.any(-1)[:, 0]

    def ours(q, k, v):
        visible = Visibility(True, jnp.int32(20))
        settings = {"scale": 0.3, "softcap": 2.0, "bias": bias}
        out = attend(q, k, v, mask=mask, segments=jnp.asarray(segments), visible=visible, **settings)
        return jnp.where(seen[..., None, None], out, 0)

    def theirs(q, k, v):
        return jnp.where(seen[..., None, None], written_out(q, k, v, allowed, 0.3, 2.0, bias), 0)

    assert_same(ours, theirs, args)


def test_a_query_that_sees_nothing_is_finite():
    query, key, value = inputs(5)
    out, grads = jax.value_and_grad(lambda q: jnp.sum(attend(q, key, value, mask=jnp.zeros((2, 5), bool))))(
        query
    )
    assert np.isfinite(out)
    assert np.isfinite(grads).all()


def test_offset_places_the_queries_among_more_keys():
    query, key, value = inputs(70)
    whole = attend(query, key, value, visible=Visibility(True))
    for offset in (60, jnp.int32(60)):
        part = attend(query[:, 60:], key, value, visible=Visibility(True, offset=offset))
        np.testing.assert_allclose(part, whole[:, 60:], atol=1e-6)


def test_dropout_draws_the_same_mask_backward_and_keeps_the_mean():
    query, key, _ = inputs(70, batch=8)
    value = jnp.ones((8, 70, 2, 8))

    def out(value):
        return attend(query, key, value, dropout=0.3, dropout_key=KEYS[5])

    value_out, pull = jax.vjp(out, value)
    assert float(jnp.std(value_out)) > 0.01
    np.testing.assert_allclose(float(value_out.mean()), 1.0, atol=0.02)
    # Linear in the values: the gradient along them is the output itself, if the masks agree.
    np.testing.assert_allclose(jnp.vdot(pull(jnp.ones_like(value_out))[0], value), value_out.sum(), rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 512, 513, 1000, 4096])
def test_segments_cover_every_row_once(length, causal):
    rows = [
        row
        for start, blocks, size in _segments(length, causal)
        for row in range(start, start + blocks * size)
    ]
    assert rows == list(range(length))
