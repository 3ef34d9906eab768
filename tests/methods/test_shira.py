"""SHiRA: a few entries of each weight, and the masks that choose them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_close, normal
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.methods._entries import random_entries
from peftjax.weights.layout import Layout

N, M = 12, 9
PARAMS = {"up": {"kernel": normal(KEY, (N, M))}}
X = normal(jax.random.key(1), (5, N))
W = np.asarray(PARAMS["up"]["kernel"])


def model(params, x):
    return x @ params["up"]["kernel"]


def loss(params, x):
    return jnp.sum(jnp.sin(model(params, x)))


def entries_of(frozen, path="up/kernel"):
    kept = frozen.state[path]
    return np.asarray(kept["rows"]), np.asarray(kept["columns"])


def largest(scores, count):
    flat = np.sort(np.argsort(-np.abs(scores).reshape(-1), kind="stable")[:count])
    return flat // M, flat % M


def test_a_fresh_adapter_is_the_base_bit_by_bit():
    method = pj.shira(rank=2)
    out = pj.adapt(model)(method.apply(*method.init(KEY, PARAMS)), X)
    np.testing.assert_array_equal(out, model(PARAMS, X))


def test_the_gradient_is_the_dense_one_at_the_entries():
    method = pj.shira(rank=2)
    frozen, trainable = method.init(KEY, PARAMS)
    found = jax.grad(lambda t: jnp.sum(jnp.sin(pj.adapt(model)(method.apply(frozen, t), X))))(trainable)
    wanted = jax.grad(loss)(PARAMS, X)["up"]["kernel"][entries_of(frozen)]
    assert_close(found["up/kernel"]["values"], wanted)


def test_count_distinct_entries_change_and_no_other():
    method = pj.shira(rank=2)
    frozen, trainable = method.init(KEY, PARAMS)
    merged = np.array(method.merge(frozen, moved(trainable))["up"]["kernel"])
    assert (merged != W).sum() == 2 * (N + M) == tree.count(trainable)
    merged[entries_of(frozen)] = W[entries_of(frozen)]
    np.testing.assert_array_equal(merged, W)
    moments = optax.adam(1e-3).init(trainable)[0]
    assert tree.nbytes((moments.mu, moments.nu)) == 8 * 2 * (N + M)


def test_all_entries_with_adam_are_full_fine_tuning():
    ends = []
    for method in (pj.shira(density=1.0), pj.full()):
        frozen, trainable = method.init(KEY, PARAMS)
        tx = optax.adam(0.1)
        state = tx.init(trainable)
        for _ in range(3):
            grads = jax.grad(lambda t, m=method, f=frozen: loss(m.merge(f, t), X))(trainable)
            updates, state = tx.update(grads, state)
            trainable = optax.apply_updates(trainable, updates)
        ends.append(method.merge(frozen, trainable))
    assert_close(*ends)


def test_the_change_has_full_rank():
    params = {"up": {"kernel": jnp.zeros((64, 64))}}
    method = pj.shira(rank=8)
    frozen, trainable = method.init(KEY, params)
    change = method.merge(frozen, jax.tree.map(lambda v: v + jax.random.normal(KEY, v.shape), trainable))
    assert np.linalg.matrix_rank(change["up"]["kernel"]) == 64


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_random_entries_are_distinct_and_uniform(density):
    layout = Layout.parse("sio", (200, 10, 8))
    count = round(density * 80)
    rows, columns = random_entries(KEY, layout, count)
    flat = np.asarray(rows) * 8 + np.asarray(columns)
    assert rows.shape == (200, count)
    assert (np.diff(flat) > 0).all()
    share = np.bincount(flat.reshape(-1), minlength=80) / 200
    error = np.sqrt(density * (1 - density) / 200)
    assert np.abs(share - count / 80).max() < 5 * error


@pytest.mark.parametrize("mask", ["magnitude", "gradient", "snip"])
def test_masks_take_the_largest_scores(mask):
    gradients = pj.calibrate.mean_gradient(loss, PARAMS, [X, 2 * X])
    of_w = np.mean([jax.grad(loss)(PARAMS, x)["up"]["kernel"] for x in (X, 2 * X)], axis=0)
    np.testing.assert_allclose(gradients["up/kernel"], of_w, rtol=1e-5, atol=1e-6)
    scores = {"magnitude": W, "gradient": gradients["up/kernel"], "snip": W * gradients["up/kernel"]}[mask]
    method = pj.shira(rank=1, mask=mask, gradients=None if mask == "magnitude" else gradients)
    np.testing.assert_array_equal(entries_of(method.init(KEY, PARAMS)[0]), largest(scores, N + M))


@pytest.mark.slow
def test_a_mask_by_gradients_comes_back_from_the_adapter(tmp_path):
    like_params = {"up": {"kernel": jax.random.normal(jax.random.key(5), (N, M))}}
    method = pj.shira(rank=1, mask="gradient", gradients=like_params)
    frozen, trainable = method.init(KEY, PARAMS)
    save_adapter(tmp_path, method, frozen, moved(trainable), seed=0)
    found = load_adapter(tmp_path, PARAMS)
    assert found.method.config["mask"] == "loaded"
    merged = found.method.merge(found.frozen, found.trainable)
    np.testing.assert_array_equal(
        merged["up"]["kernel"], method.merge(frozen, moved(trainable))["up"]["kernel"]
    )


def test_a_structured_mask_has_rows_columns_and_the_diagonal():
    frozen, _ = pj.shira(rank=3, mask="struct").init(KEY, PARAMS)
    mask = np.zeros((N, M), bool)
    mask[entries_of(frozen)] = True
    rows, columns = mask.all(axis=1), mask.all(axis=0)
    assert rows[0]
    assert columns[0]
    assert mask[np.arange(M), np.arange(M)].all()
    assert mask.sum() <= 3 * (N + M)
    covered = rows[:, None] | columns | np.eye(N, M, dtype=bool)
    np.testing.assert_array_equal(mask, covered)


def test_the_weight_of_an_adapter_scales_its_change():
    method = pj.shira(rank=2)
    frozen, trainable = method.init(KEY, PARAMS)
    one, half, none = (
        pj.adapt(model)(pj.adapters.add([(method, frozen, moved(trainable))], [a]), X)
        for a in (1.0, 0.5, 0.0)
    )
    assert float(jnp.abs(one - none).max()) > 0.1
    assert_close(half - none, 0.5 * (one - none))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6}, "126 entries do not fit 'up/kernel', a matrix of 12 x 9"),
        ({"density": 1.5}, r"density must be in \(0, 1\]"),
        ({"mask": "largest"}, "mask must be one of random, .*, got 'largest'"),
        ({"mask": "snip"}, "'snip' and gradients do not go together"),
        ({"rank": 1, "mask": "snip", "gradients": {"up": {"kernel": W[1:]}}}, "no array of shape"),
        ({"rank": 1, "mask": "struct"}, "a structured mask of 'up/kernel' needs"),
    ],
)
def test_errors(options, message):
    with pytest.raises(PeftError, match=message):
        pj.shira(**options).init(KEY, PARAMS)


def test_no_batch_is_an_error():
    with pytest.raises(PeftError, match="there is no batch"):
        pj.calibrate.mean_gradient(loss, PARAMS, [])
