"""Entries chosen over the whole model (LT-SFT, Child-tuning_D), and gradients masked at random (F)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, noisy, normal

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.selection.child_tuning_f import random_masks

PARAMS = {
    "layers": {"kernel": normal(KEY, (2, 6, 6))},
    "up": {"kernel": normal(jax.random.key(1), (6, 4)), "bias": jnp.zeros(4)},
}
X = normal(jax.random.key(2), (5, 6))
TARGET = normal(jax.random.key(3), (5, 4))
CHANGES = jax.tree.map(lambda w: normal(jax.random.key(w.size), w.shape), PARAMS)
BY_PATH = {f"{name}/kernel": PARAMS[name]["kernel"] for name in PARAMS}
SIZE = 2 * 36 + 24


@pj.adapt
def loss(params, batch):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch["x"], params["layers"]["kernel"])
    return jnp.mean((h @ params["up"]["kernel"] + params["up"]["bias"] - TARGET) ** 2)


def trained(method, tx, steps=3):
    training = pj.training(method, loss, tx)
    state = training.start(KEY, PARAMS)
    for _ in range(steps):
        state, _ = training.step(state, {"x": X})
    return method.merge(state.frozen, state.trainable), state


def weights_of(tree):
    return np.concatenate([np.ravel(tree[name]["kernel"]) for name in ("layers", "up")])


@pytest.mark.parametrize("in_place", [False, True])
def test_exactly_the_entries_that_changed_most_are_trained(in_place):
    density = 21 / SIZE
    method = pj.lt_sft(changes=CHANGES, density=density, in_place=in_place)
    merged, state = trained(method, optax.adam(0.1))
    moved = weights_of(merged) != weights_of(PARAMS)
    sizes = np.abs(weights_of(CHANGES))
    assert moved.sum() == 21
    assert (moved == (sizes >= np.sort(sizes)[-21])).all()
    frozen, _ = method.open(state.frozen, state.trainable)
    jax.tree.map(np.testing.assert_array_equal, frozen.params, PARAMS)


def test_of_equal_changes_no_more_than_asked_for_are_taken():
    flat = jax.tree.map(jnp.ones_like, PARAMS)
    frozen, trainable = pj.lt_sft(changes=flat, density=0.25).init(KEY, PARAMS)
    merged = pj.lt_sft(changes=flat, density=0.25).merge(frozen, noisy(trainable))
    assert (weights_of(merged) != weights_of(PARAMS)).sum() == SIZE // 4
    assert list(trainable) == ["layers/kernel"]  # the others have none


def test_with_all_entries_it_is_fine_tuning():
    every, _ = trained(pj.lt_sft(changes=CHANGES, density=1.0), optax.adam(0.01))
    full, _ = trained(pj.unfreeze(["kernel"]), optax.adam(0.01))
    np.testing.assert_allclose(weights_of(every), weights_of(full), rtol=1e-4, atol=1e-6)


def test_a_language_and_a_task_are_added_in_any_order():
    found = []
    for number, density in enumerate((0.2, 0.4)):
        drawn = jax.random.key(number + 7)
        changes = {path: normal(drawn, w.shape) for path, w in BY_PATH.items()}
        method = pj.lt_sft(changes=changes, density=density)
        frozen, trainable = method.init(KEY, PARAMS)
        found.append((method, frozen, noisy(trainable, jax.random.key(number))))
    changed = [weights_of(method.merge(frozen, own)) - weights_of(PARAMS) for method, frozen, own in found]
    wanted = weights_of(PARAMS) + changed[0] + changed[1]
    sums = []
    for order in (found, found[::-1]):
        added = pj.adapters.add(order)
        sums.append(np.concatenate([np.ravel(added[name]["kernel"].dense()) for name in ("layers", "up")]))
        np.testing.assert_allclose(sums[-1], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*sums, rtol=1e-6, atol=1e-7)


def test_an_adapter_comes_back_from_its_folder_without_the_changes(tmp_path):
    method = pj.lt_sft(changes=CHANGES, density=0.3)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    pj.adapters.save_adapter(tmp_path, method, frozen, trainable, seed=0)
    again = pj.adapters.load_adapter(tmp_path, PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal,
        again.method.merge(again.frozen, again.trainable),
        method.merge(frozen, trainable),
    )


def test_child_tuning_d_takes_the_largest_fisher_information():
    fisher = pj.calibrate.fisher_information(loss, PARAMS, [{"x": X}], targets=["kernel"], per_example=False)
    method = pj.child_tuning_d(fisher=fisher, density=10 / SIZE)
    merged, _ = trained(method, optax.sgd(0.1), steps=1)
    moved = weights_of(merged) != weights_of(PARAMS)
    sizes = np.concatenate([np.ravel(fisher[f"{name}/kernel"]) for name in ("layers", "up")])
    assert (moved == (sizes >= np.sort(sizes)[-10])).all()


def test_child_tuning_f_reaches_another_share_in_each_step():
    tx = random_masks(0.25, 3)
    g = {"w": jnp.full((100, 100), 2.0)}
    first, state = tx.update(g, tx.init(g))
    second, _ = tx.update(g, state)
    again, _ = random_masks(0.25, 3).update(g, tx.init(g))
    np.testing.assert_array_equal(first["w"], again["w"])
    assert set(np.unique(first["w"])) == {0.0, 8.0}
    assert abs(float(np.mean(first["w"])) - 2.0) < 0.1
    both = np.mean((first["w"] != 0) & (second["w"] != 0))
    assert abs(both - 0.25**2) < 0.01
    method = pj.child_tuning_f(share=0.25)
    merged, _ = trained(method, optax.sgd(0.1), steps=1)
    moved = weights_of(merged) != weights_of(PARAMS)
    gradient = weights_of(jax.grad(lambda p: loss(p, {"x": X}))(PARAMS))
    assert 0.1 < moved.mean() < 0.45
    stepped = (weights_of(PARAMS) - 0.4 * gradient)[moved]
    np.testing.assert_allclose(weights_of(merged)[moved], stepped, rtol=1e-4, atol=1e-6)


def test_scores_of_another_model_are_refused():
    other = {"up": {"kernel": jnp.ones((3, 4))}}
    with pytest.raises(PeftError, match="have no weight 'up/kernel'"):
        pj.lt_sft(changes=other).init(KEY, PARAMS)
    with pytest.raises(PeftError, match="not finite"):
        pj.lt_sft(changes=jax.tree.map(lambda w: w * jnp.nan, PARAMS))
