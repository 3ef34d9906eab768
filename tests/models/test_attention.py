"""Attention in blocks of rows equals the formula written out, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import normal, quick_at

from peftjax.backbone.attention import Visibility, _segments, attend

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_query_that_sees_nothing_is_finite():
    query, key, value = inputs(5)
    out, grads = jax.value_and_grad(lambda q: jnp.sum(attend(q, key, value, mask=jnp.zeros((2, 5), bool))))(
        query
    )
    assert np.isfinite(out)
    assert np.isfinite(grads).all()


@pytest.mark.slow
def test_offset_places_the_queries_among_more_keys():
    query, key, value = inputs(70)
    whole = attend(query, key, value, visible=Visibility(True))
    for offset in (60, jnp.int32(60)):
        part = attend(query[:, 60:], key, value, visible=Visibility(True, offset=offset))
        np.testing.assert_allclose(part, whole[:, 60:], atol=1e-6)


@pytest.mark.slow
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


# A prefix.

PREFIX = {
    "keys": normal(KEYS[4], (3, 16)),
    "values": normal(KEYS[3], (3, 16)),
}


def concatenated(query, key, value, prefix, allowed, **settings):
    """The prefix as the first keys and values of every row, seen by all."""
    keys, values = (jnp.broadcast_to(prefix[n].reshape(1, 3, 2, 8), (2, 3, 2, 8)) for n in ("keys", "values"))
    key, value = jnp.concatenate([keys, key], axis=1), jnp.concatenate([values, value], axis=1)
    first = ((0, 0),) * (np.ndim(allowed) - 1) + ((3, 0),)
    settings |= {"bias": jnp.pad(bias, first)} if (bias := settings.pop("bias", None)) is not None else {}
    return written_out(query, key, value, np.pad(allowed, first, constant_values=True), **settings)


def assert_same_with_prefix(ours, theirs, args):
    def loss(run):
        return jax.jit(jax.value_and_grad(lambda a: jnp.sum(jnp.sin(run(*a[:3], a[3])))))(args)

    for a, b in zip(jax.tree.leaves(loss(ours)), jax.tree.leaves(loss(theirs))):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("length", "causal", "window"), quick_at([(5, False, None), (130, True, None), (130, True, 70)], 2)
)
def test_a_prefix_is_concatenated_keys_and_values(length, causal, window):
    visible, allowed = Visibility(causal, window), order(length, causal, window)
    assert_same_with_prefix(
        lambda q, k, v, p: attend(q, k, v, visible=visible, prefix=p),
        lambda q, k, v, p: concatenated(q, k, v, p, allowed),
        (*inputs(length), PREFIX),
    )


def test_a_prefix_is_seen_in_spite_of_mask_segments_and_window_and_has_no_bias():
    length = 100
    mask = np.ones((2, length), bool)
    mask[0, :9] = mask[1, 80:] = False  # the first rows of the one see the prefix alone
    segments = np.repeat([[1, 2], [1, 3]], length // 2, axis=1)
    settings = {"scale": 0.3, "softcap": 2.0, "bias": jax.random.normal(KEYS[5], (1, 4, length, length))}
    allowed = (
        order(length, True, 20) & mask[:, None, None] & (segments[:, :, None] == segments[:, None])[:, None]
    )
    own = {"mask": mask, "segments": jnp.asarray(segments), "visible": Visibility(True, jnp.int32(20))}
    assert_same_with_prefix(
        lambda q, k, v, p: attend(q, k, v, prefix=p, **own, **settings),
        lambda q, k, v, p: concatenated(q, k, v, p, allowed, **settings),
        (*inputs(length), PREFIX),
    )


@pytest.mark.slow
def test_a_prefix_is_a_gate_between_two_attentions():
    """(1 - g) attention to the tokens + g attention to the prefix, g the prefix's share of the sum."""
    query, key, value = inputs(70)
    keys, values = (jnp.broadcast_to(PREFIX[n].reshape(1, 3, 2, 8), (2, 3, 2, 8)) for n in ("keys", "values"))
    sums = []
    for one in (keys, key):
        scores = jnp.einsum("btnh,bsnh->btns", query, jnp.repeat(one, 2, axis=2)) * 8**-0.5
        sums.append(jnp.exp(scores).sum(-1, keepdims=True))
    gate = sums[0] / (sums[0] + sums[1])
    wanted = (1 - gate) * attend(query, key, value) + gate * attend(query, keys, values)
    assert 0.001 < float(gate.min()) < 0.02 < float(gate.max())
    np.testing.assert_allclose(attend(query, key, value, prefix=PREFIX), wanted, atol=1e-6)


@pytest.mark.slow
def test_a_prefix_that_is_not_seen_is_not_there():
    query, key, value = inputs(70)
    base = attend(query, key, value, visible=Visibility(True))
    unseen = {**PREFIX, "seen": jnp.zeros(3, bool)}
    run = lambda prefix: attend(query, key, value, visible=Visibility(True), prefix=prefix)
    np.testing.assert_array_equal(run(unseen), base)
    some = {**PREFIX, "seen": jnp.array([True, False, True])}
    np.testing.assert_allclose(run(some), run({n: PREFIX[n][::2] for n in PREFIX}), atol=1e-6)
    grads = jax.grad(lambda keys: jnp.sum(jnp.sin(run({**some, "keys": keys}))))(PREFIX["keys"])
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(np.abs(grads).max(1) > 0, some["seen"])


def test_a_prefix_is_kept_once_for_all_rows_and_no_scores_are():
    query, key, value = inputs(200)
    kept = jax.eval_shape(
        lambda *args: jax.vjp(lambda q, k, v, p: attend(q, k, v, prefix=p), *args)[1],
        query,
        key,
        value,
        PREFIX,
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert (3, 16) in shapes
    assert max(map(np.prod, shapes)) <= query.size


@pytest.mark.slow
def test_dropout_of_a_prefix_keeps_the_mean():
    query, key, _ = inputs(70, batch=8)
    prefix, value = {**PREFIX, "values": jnp.ones((3, 16))}, jnp.zeros((8, 70, 2, 8))
    run = lambda **drop: attend(query, key, value, prefix=prefix, **drop)
    dropped = run(dropout=0.3, dropout_key=KEYS[5])
    assert float(jnp.abs(dropped - run()).max()) > 0.01
    np.testing.assert_allclose(float(dropped.mean()), float(run().mean()), rtol=0.05)


def gradients(args):
    return jax.grad(lambda *a: attend(*a, visible=Visibility(True)).sum(dtype="float32"), (0, 1, 2))(*args)


def test_what_a_causal_mask_takes_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr("peftjax.backbone.attention.GROUPS", 2)

    def temporaries(length):
        of_shape = jax.ShapeDtypeStruct((1, length, 1, 8), "float32")
        return jax.jit(gradients).lower([of_shape] * 3).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.1 * temporaries(1024)


def test_gradients_of_bfloat16_keys_are_summed_over_blocks_in_float32(monkeypatch):
    monkeypatch.setattr("peftjax.backbone.attention.GROUPS", 1)
    monkeypatch.setattr("peftjax.backbone.attention.ROWS", 4)
    coarse = [x.astype("bfloat16") for x in inputs(512, heads=1, kv_heads=1, batch=1)]
    got, want = (jax.jit(gradients)(args) for args in (coarse, [x.astype("float32") for x in coarse]))
    for a, b in zip(got, want):
        error = jnp.linalg.norm(a.astype("float32") - b) / jnp.linalg.norm(b)
        assert error < 0.004
