"""SaRA: the smallest entries, their penalty, and selecting again."""

import itertools
from dataclasses import replace

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
from peftjax.methods.sparse._nuclear import exact_polar_factor, polar_factor
from peftjax.methods.sparse.sara import learning_rate

N, M = 12, 9
PARAMS = {"up": {"kernel": 0.1 * normal(KEY, (N, M))}}
STACKED = {"up": {"kernel": 0.1 * normal(KEY, (3, N, M))}}
X = normal(jax.random.key(1), (5, N))
W = np.asarray(PARAMS["up"]["kernel"])


def loss(params, x):
    w = params["up"]["kernel"]
    return jnp.sum(jnp.sin(x @ (w[0] if w.ndim == 3 else w)))


def grad_of(method, frozen, loss=loss):
    return jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t), X))


def entries_of(frozen):
    kept = frozen.state["up/kernel"]
    return np.asarray(kept["rows"]), np.asarray(kept["columns"])


def train(method, params, steps, tx, loss=loss):
    """The states before the first step and after each."""
    training = pj.training(method, pj.adapt(loss), tx)
    states = [training.start(KEY, params)]
    for _ in range(steps):
        last = states[-1]
        frozen, trainable, opt = jax.tree.map(jnp.copy, (last.frozen, last.trainable, last.opt_state))
        given = replace(last, frozen=frozen, trainable=trainable, opt_state=opt)  # donated
        states.append(training.step(given, X)[0])
    return states


def merged(method, state):
    return method.merge(state.frozen, state.trainable)["up"]["kernel"]


def all_of(states, name):
    """The values, or what is held of them, in each state."""
    parts = (s.trainable if name == "values" else s.frozen.state for s in states)
    return [np.asarray(part["up/kernel"][name]) for part in parts]


def test_the_smallest_entries_are_selected_and_step_0_is_the_base():
    method = pj.sara(density=0.25)
    frozen, trainable = method.init(KEY, PARAMS)
    rows, columns = entries_of(frozen)
    assert rows.size == 27
    others = np.abs(W).copy()
    others[rows, columns] = np.inf
    assert np.abs(W[rows, columns]).max() < others.min()
    np.testing.assert_array_equal(method.merge(frozen, trainable)["up"]["kernel"], W)


def test_other_entries_never_change_also_with_weight_decay():
    method = pj.sara(density=0.25)
    state = train(method, PARAMS, 4, optax.adamw(0.01, weight_decay=0.1))[-1]
    found, at = np.array(merged(method, state)), entries_of(state.frozen)
    assert (found[at] != W[at]).all()
    found[at] = W[at]
    np.testing.assert_array_equal(found, W)
    moments = state.opt_state.optimizer[0]
    values = [moment["up/kernel"]["values"] for moment in (moments.mu, moments.nu)]
    assert tree.nbytes(values) == 8 * 27


def nuclear(matrix):
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False))


@pytest.mark.slow
@pytest.mark.parametrize(("polar", "tolerance"), [("svd", 1e-5), ("newton_schulz", 1e-2)])
def test_the_gradient_is_the_dense_one_plus_that_of_the_nuclear_norm(polar, tolerance):
    method = pj.sara(density=0.5, penalty=2.0, polar=polar)
    frozen, trainable = method.init(KEY, PARAMS)
    at = entries_of(frozen)

    def by_hand(values):
        masked = jnp.zeros((N, M)).at[at].set(values)
        return loss({"up": {"kernel": jnp.asarray(W).at[at].set(values)}}, X) + 2.0 * nuclear(masked)

    wanted = jax.grad(by_hand)(trainable["up/kernel"]["values"])
    found = grad_of(method, frozen)(trainable)["up/kernel"]
    assert set(found) == {"values"}
    assert_close(found["values"], wanted, tolerance)
    assert frozen.state["up/kernel"]["keep"].dtype == bool


def test_polar_factors_agree_and_zero_has_none():
    matrix = jax.random.normal(KEY, (24, 40))
    assert_close(polar_factor(matrix), exact_polar_factor(matrix), 1e-4)
    assert_close(polar_factor(matrix.T), exact_polar_factor(matrix).T, 1e-4)
    assert not polar_factor(jnp.zeros((3, 4))).any()


@pytest.mark.slow
def test_a_large_penalty_drives_the_nuclear_norm_down():
    method = pj.sara(density=0.5, penalty=100.0)
    states = train(method, PARAMS, 20, optax.adam(1e-3))
    at = entries_of(states[0].frozen)
    norms = [nuclear(jnp.zeros((N, M)).at[at].set(values)) for values in all_of(states[::20], "values")]
    assert norms[1] < 0.9 * norms[0]


def test_a_threshold_above_all_is_adamw():
    tx = optax.adamw(0.01, weight_decay=0.1)
    method, full = pj.sara(threshold=1e9, penalty=0.0), pj.full()
    found, dense = train(method, PARAMS, 3, tx)[-1], train(full, PARAMS, 3, tx)[-1]
    assert_close(merged(method, found), merged(full, dense), 1e-6)


@pytest.mark.slow
def test_a_threshold_fills_the_matrices_of_a_stack_up():
    threshold = 0.02
    method = pj.sara(threshold=threshold)
    states = train(method, STACKED, 2, optax.adamw(0.01, weight_decay=0.1))
    below = np.abs(np.asarray(STACKED["up"]["kernel"])) < threshold
    counts = below.sum(axis=(1, 2))
    keep = all_of(states, "keep")
    assert keep[0].shape == (3, counts.max())
    assert min(counts) < max(counts)
    np.testing.assert_array_equal(keep[-1].sum(axis=1), counts)
    changed = np.asarray(merged(method, states[-1])) != np.asarray(STACKED["up"]["kernel"])
    np.testing.assert_array_equal(changed, below)


def selected_again(tx=None, **options):
    method = pj.sara(density=0.5, penalty=0.0, reselect_at=3, **options)
    return train(method, PARAMS, 6, tx or optax.adamw(0.02, weight_decay=0.1))


def test_from_reselection_on_the_others_are_constant_and_no_step_is_lost():
    states = selected_again()
    values, keep = all_of(states, "values"), all_of(states, "keep")
    limit = np.abs(W[entries_of(states[0].frozen)]).max()
    assert all(mask.dtype == bool for mask in keep)
    assert all(mask.all() for mask in keep[:4])
    kept = np.abs(values[3]) <= limit
    assert 0 < kept.sum() < kept.size
    for mask in keep[4:]:
        np.testing.assert_array_equal(mask, kept)
    for before, after in itertools.pairwise(values[3:]):
        np.testing.assert_array_equal(after != before, kept)
    adam = states[-1].opt_state.optimizer[0]
    assert int(adam.count) == 3
    np.testing.assert_array_equal(adam.mu["up/kernel"]["values"] != 0, kept)


def test_reselection_starts_the_optimizer_again_and_the_schedule_goes_on():
    seen = []

    def rate(count):
        seen.append(count)
        return jnp.where(count < 4, 0.02, 0.01)

    states = selected_again(optax.adam(rate))
    values, kept = all_of(states, "values"), all_of(states, "keep")[-1]
    # Adam's first update is the rate in size, whatever the gradient.
    np.testing.assert_allclose(np.abs(values[4] - values[3])[kept], 0.02, rtol=1e-3)
    assert int(states[-1].opt_state.optimizer[1].count) == 6
    assert seen


def test_in_a_chain_only_its_own_values_are_held():
    params = {**PARAMS, "bias": jnp.zeros(M)}
    method = pj.chain(pj.sara(density=0.5, reselect_at=1), pj.unfreeze(["bias"]))

    def with_bias(params, x):
        return loss(params, x) + jnp.sum(jnp.cos(params["bias"] + 1.0))

    states = train(method, params, 3, optax.adam(0.05), with_bias)
    assert len({float(s.trainable["unfreeze"]["bias"][0]) for s in states}) == 4
    counts = [int(s.frozen.state["sara"]["up/kernel"]["keep"].sum()) for s in states]
    assert counts[0] == counts[1] > counts[2] == counts[3]


def test_a_saved_adapter_gives_the_same_weights(tmp_path):
    method = pj.sara(threshold=0.05)
    frozen, trainable = method.init(KEY, PARAMS)
    trained = moved(trainable)
    save_adapter(tmp_path, method, frozen, trained, seed=3)
    found = load_adapter(tmp_path, PARAMS)
    assert found.trainable["up/kernel"]["values"].size == (np.abs(W) < 0.05).sum()
    np.testing.assert_array_equal(merged(found.method, found), method.merge(frozen, trained)["up"]["kernel"])


def test_the_learning_rate_of_a_threshold():
    assert learning_rate(2e-3) == pytest.approx(4.966e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1, "threshold": 0.1}, "a density or a threshold, not both"),
        ({"density": 0.0}, r"density must be in \(0, 1\]"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"threshold": 1e-9}, "no entry of the targets is smaller than 1e-09"),
        ({"penalty": -1.0}, "penalty must be 0 or more"),
        ({"polar": "qr"}, "polar must be"),
        ({"reselect_at": -1}, "reselect_at must be 0 or more"),
    ],
)
def test_errors(options, message):
    with pytest.raises(PeftError, match=message):
        pj.sara(**options).init(KEY, PARAMS)


def test_a_threshold_needs_the_weights_values():
    with pytest.raises(PeftError, match="outside jit"):
        jax.eval_shape(pj.sara(threshold=0.1).init, KEY, PARAMS)


def test_its_optimizer_asks_for_what_is_held():
    _, trainable = pj.sara().init(KEY, PARAMS)
    tx = pj.sara().optimizer(optax.sgd(0.1))
    with pytest.raises(PeftError, match=r"tx.update\(gradients, state, trainable, frozen=frozen\)"):
        tx.update(trainable, tx.init(trainable), trainable)
