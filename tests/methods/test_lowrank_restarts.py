"""Balanced factors, and the method that trains nothing but factors and rebalances them."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pretraining import (
    PARAMS,
    M,
    N,
    X,
    advanced,
    assert_same_end,
    forward,
    merged,
    resting,
    resumed,
    sharded,
    started,
)
from support import KEY, assert_close, assert_no_dense_gradient, noisy, normal, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError

R = 3
K = jax.random.split(KEY, 2)
A, B = normal(K[0], (2, R, N)), normal(K[1], (2, R, M))


def product(a, b):
    return jnp.einsum("...rn,...rm->...nm", a, b)


def make(**options):
    return pj.lowrank_restarts(**{"rank": R, "every": 4, **options})


def restart(run, state):
    return advanced(run, state, 4)


def after_steps(method, tx, count=3, **options):
    run, state = started(method, tx, **options)
    for _ in range(count):
        state, _ = run.step(state, X)
    return run, state


# rebalance


def test_the_product_stays_and_both_factors_share_its_singular_values():
    a, b = pj.adapters.rebalance(A, B)
    assert_close(product(a, b), product(A, B))
    sizes = np.linalg.svd(product(A, B), compute_uv=False)[:, :R]
    wanted = jnp.asarray(sizes[:, :, None] * np.eye(R))
    assert_close(jnp.einsum("srn,sqn->srq", a, a), wanted)
    assert_close(jnp.einsum("srm,sqm->srq", b, b), wanted)
    assert float(jnp.abs(a - A).max()) > 0.1


def test_it_is_the_singular_value_decomposition_of_the_dense_product():
    a, b = pj.adapters.rebalance(A[0], B[0])
    u, sizes, vt = np.linalg.svd(np.asarray(product(A[0], B[0])), full_matrices=False)
    for row in range(R):
        sign = np.sign(np.vdot(u[:, row], a[row]))
        assert_close(sign * a[row], np.sqrt(sizes[row]) * u[:, row])
        assert_close(sign * b[row], np.sqrt(sizes[row]) * vt[row])


def test_twice_is_once_up_to_signs():
    once = pj.adapters.rebalance(A, B)
    twice = pj.adapters.rebalance(*once)
    assert_close(jnp.abs(twice[0]), jnp.abs(once[0]))
    assert_close(jnp.abs(twice[1]), jnp.abs(once[1]))


def test_a_matrix_without_full_rank_keeps_its_factors_and_the_others_do_not():
    lost = B.at[1].set(0.0)
    a, b = pj.adapters.rebalance(A, lost)
    np.testing.assert_array_equal(a[1], A[1])
    np.testing.assert_array_equal(b[1], 0.0)
    assert float(jnp.abs(a[0] - A[0]).max()) > 0.1
    same = A.at[0, 1].set(A[0, 0])
    np.testing.assert_array_equal(pj.adapters.rebalance(same, B)[0][0], same[0])


def test_bfloat16_factors_drift_by_their_rounding():
    a, b = A.astype(jnp.bfloat16), B.astype(jnp.bfloat16)
    new = pj.adapters.rebalance(a, b)
    assert new[0].dtype == new[1].dtype == jnp.bfloat16
    exact, drifted = (product(*(f.astype(jnp.float32) for f in pair)) for pair in ((a, b), new))
    assert 1e-4 < float(jnp.linalg.norm(drifted - exact) / jnp.linalg.norm(exact)) < 4e-3


@pytest.mark.parametrize("shapes", [((2, 3, 9), (3, 8)), ((3, 9), (2, 8)), ((5, 4), (5, 8)), ((3,), (3,))])
def test_factors_that_do_not_fit_are_refused(shapes):
    with pytest.raises(PeftError, match="rebalance: a "):
        pj.adapters.rebalance(*map(jnp.ones, shapes))


def test_a_trained_lora_is_rebalanced_to_the_same_model():
    method = pj.lora(rank=2, targets=["up"])
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    balanced = {path: dict(zip("ab", pj.adapters.rebalance(s["a"], s["b"]))) for path, s in trainable.items()}
    assert_close(method.merge(frozen, balanced), method.merge(frozen, trainable))


# The method.


def test_only_factors_and_the_rest_are_held_anywhere():
    frozen, trainable = make().init(KEY, PARAMS)
    assert set(trainable) == {"up/kernel", "blocks/down/weight", "norm/scale"}
    assert {name: s.shape for name, s in trainable["blocks/down/weight"].items()} == {
        "a": (2, R, M),
        "b": (2, R, N),
    }
    assert not jax.tree.leaves(frozen)
    frozen, trainable = make(train_rest=False).init(KEY, PARAMS)
    assert "norm/scale" not in trainable
    assert len(jax.tree.leaves(frozen)) == 1


def test_no_dense_weight_and_no_dense_gradient_is_formed():
    assert_no_dense_gradient(forward, PARAMS, make(), X)


def test_the_rank_is_a_quarter_of_the_smaller_side_if_not_given():
    _, trainable = make(rank=None, rank_pattern={"down": 5}).init(KEY, PARAMS)
    assert trainable["up/kernel"]["a"].shape == (2, N)
    assert trainable["blocks/down/weight"]["a"].shape == (2, 5, M)


@pytest.mark.slow
def test_a_spectral_start_is_the_best_approximation_and_a_random_one_has_the_variance():
    params = {"up": {"kernel": jax.random.normal(KEY, (2, 400, 300)) * jnp.array([1.0, 5.0])[:, None, None]}}
    merged = {}
    for start in ("spectral", "random"):
        method = make(rank=75, start=start)
        merged[start] = np.asarray(method.merge(*method.init(KEY, params))["up"]["kernel"])
    w = np.asarray(params["up"]["kernel"])
    u, sizes, vt = np.linalg.svd(w, full_matrices=False)
    sizes[:, 75:] = 0
    np.testing.assert_allclose(merged["spectral"], (u * sizes[:, None]) @ vt, atol=1e-3)
    np.testing.assert_allclose(merged["random"].std((1, 2)), w.std((1, 2)), rtol=0.05)
    assert (merged["spectral"].std((1, 2)) < 0.85 * w.std((1, 2))).all()


def test_a_restart_changes_no_output_and_the_factors_only():
    run, state = after_steps(make(), optax.adam(0.01))
    new = restart(run, state)
    assert_close(merged(run, new), merged(run, state), 1e-5)
    assert float(jnp.abs(new.trainable["up/kernel"]["a"] - state.trainable["up/kernel"]["a"]).max()) > 1e-3
    rest, old = (s.trainable["norm/scale"]["value"] for s in (new, state))
    np.testing.assert_array_equal(rest, old)


@pytest.mark.parametrize(("reset", "zero"), [("m", {"mu"}), ("m,v", {"mu", "nu"})])
def test_a_restart_zeroes_the_moments_of_factors(reset, zero):
    after = restart(*after_steps(make(reset=reset), optax.adam(0.01))).opt_state
    for field in ("mu", "nu"):
        for path in ("up/kernel", "blocks/down/weight"):
            for name in "ab":
                assert (not getattr(after[0], field)[path][name].any()) == (field in zero)
        assert getattr(after[0], field)["norm/scale"]["value"].all()
    assert int(after[0].count) == 3


def test_the_first_update_after_a_reset_of_counts_too_is_that_of_a_fresh_adam():
    tx = pj.optim.row_adamw(0.01, weight_decay=0.0)
    run, state = after_steps(make(reset="m,v,count"), tx)
    state = restart(run, state)
    before = jnp.copy(state.trainable["up/kernel"]["a"])
    new, _ = resting(run).step(state, X)
    step = jnp.abs(new.trainable["up/kernel"]["a"] - before)
    np.testing.assert_allclose(step, 0.01, rtol=1e-3)


def test_the_first_update_after_a_reset_of_the_first_moment_is_a_tenth():
    """(1 - b1) / (1 - b1ᵗ) of the gradient, over the root of the old second moment."""
    run, state = after_steps(make(reset="m"), optax.adam(0.01))
    state = restart(run, state)
    old, nu = (jnp.copy(t["up/kernel"]["b"]) for t in (state.trainable, state.opt_state[0].nu))
    new, _ = resting(run).step(state, X)
    grad = new.opt_state[0].mu["up/kernel"]["b"] / 0.1
    second = (0.999 * nu + 0.001 * grad**2) / (1 - 0.999**4)
    wanted = -0.01 * 0.1 / (1 - 0.9**4) * grad / (jnp.sqrt(second) + 1e-8)
    np.testing.assert_allclose(new.trainable["up/kernel"]["b"] - old, wanted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reset", quick_at(["m", "m,v"], 0))
def test_a_restart_in_the_middle_of_a_window_turns_the_sum_into_gradients_of_the_new_factors(reset):
    tx = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    method = make(reset=reset, train_rest=False)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable, loss = noisy(trainable), lambda params: jnp.sum(jnp.sin(pj.adapt(forward)(params, X)))
    tx, begun = method.optimizer(tx), replace(frozen, advanced=True)
    gradient = jax.jit(jax.grad(lambda t: loss(method.apply(begun, t))))
    _, state = tx.update(gradient(trainable), tx.init(trainable), trainable, frozen=frozen)
    _, new, state = method.advance(loss, frozen, trainable, state, step=4, key=KEY, tx=tx)
    assert_close(state.acc_grads, gradient(new), 1e-3)
    assert not all(jnp.allclose(*pair, 1e-2) for pair in zip(*map(jax.tree.leaves, (trainable, new))))


def test_counts_of_an_optimizer_that_has_one_for_all_are_refused():
    run, state = after_steps(make(reset="m,v,count"), optax.adam(0.01), 0)
    with pytest.raises(PeftError, match=r"use pj\.optim.row_adamw"):
        restart(run, state)


@pytest.mark.slow
def test_sparse_entries_beside_the_factors_start_as_the_weights_own_and_stay_through_a_restart():
    method, tx = make(density=0.2), optax.adam(0.01)
    frozen, trainable = method.init(KEY, PARAMS)
    rows, columns = (np.asarray(frozen.state["up/kernel"][name]) for name in ("rows", "columns"))
    assert len(rows) == round(0.2 * N * M)
    own, given = np.asarray(method.merge(frozen, trainable)["up"]["kernel"]), PARAMS["up"]["kernel"]
    np.testing.assert_allclose(own[rows, columns], given[rows, columns], atol=1e-6)
    assert np.isclose(own, given, atol=1e-6).sum() == len(rows)
    run, state = after_steps(method, tx)
    moments, trainable = state.opt_state[0].mu["up/kernel"], state.trainable
    assert (moments["values"] != 0).all()
    after = restart(run, state)
    was = merged(run, state)
    begun = replace(state.frozen, advanced=True)
    assert_close(pj.adapt(forward)(method.apply(begun, trainable), X), forward(was, X))
    assert_close(merged(run, after), was)
    np.testing.assert_array_equal(after.trainable["up/kernel"]["values"], trainable["up/kernel"]["values"])
    np.testing.assert_array_equal(after.opt_state[0].mu["up/kernel"]["values"], moments["values"])
    assert not after.opt_state[0].mu["up/kernel"]["a"].any()


def test_restarts_are_due_every_t_steps_but_not_at_the_first():
    due = make(every=3).advances[0].due
    assert [step for step in range(10) if due(step)] == [3, 6, 9]


def test_in_a_chain_only_its_own_moments_are_reset():
    method = pj.chain(make(targets=["up"], train_rest=False), pj.lora(rank=2, targets=["down"]))
    run, state = after_steps(method, optax.adam(0.01))
    new = restart(run, state)
    assert_close(merged(run, new), merged(run, state))
    moments = new.opt_state[0].mu
    assert not moments["lowrank_restarts"]["up/kernel"]["a"].any()
    assert moments["lora"]["blocks/down/weight"]["b"].any()


@pytest.mark.slow
def test_sharded_over_eight_devices_it_is_that_of_one():
    found = []
    for place in (lambda slots: slots, sharded):
        run, state = after_steps(make(), optax.adam(0.01), 1, place=place)
        state = restart(run, state)
        found.append((merged(run, state), resting(run).step(state, X)[0].trainable))
    assert not found[1][1]["up/kernel"]["a"].sharding.is_fully_replicated
    assert_close(found[1][0], found[0][0])


@pytest.mark.slow
def test_a_run_goes_on_bit_exactly(tmp_path):
    continued, whole = resumed(pj.lowrank_restarts(rank=3, every=3, targets=["layer"]), tmp_path)
    assert_same_end(continued, whole)
    assert continued.step == whole.step == 10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, "lowrank_restarts: every must be positive, got 0"),
        ({"density": 1.5}, r"lowrank_restarts: density must be in \(0, 1\], got 1.5"),
        ({"start": "svd"}, "lowrank_restarts: start must be one of random, spectral, got 'svd'"),
        ({"reset": "v"}, "lowrank_restarts: reset must be one of m, m,v, m,v,count, got 'v'"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(PeftError, match=text):
        make(**options)


MANY = """
import jax
import peftjax as pj

keys = jax.random.split(jax.random.key(0), 7)
pairs = [(jax.random.normal(key, (4, 40, 160)), jax.random.normal(key, (4, 40, 426))) for key in keys]
balanced = jax.jit(lambda pairs: [pj.adapters.rebalance(a, b) for a, b in pairs])
for _ in range(10):
    jax.block_until_ready(balanced(pairs))
"""


@pytest.mark.slow
def test_restarts_of_many_stacks_at_once_come_to_an_end():
    """In batched decompositions XLA's CPU runtime stood still, on all cores that there are."""
    subprocess.run([sys.executable, "-c", MANY], check=True, timeout=300)
