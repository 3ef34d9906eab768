"""Adam with a step count for each row: without resets optax's, with them the equations row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftjax import optim
from peftjax.core.errors import PeftError
from peftjax.optim.row_adam import zero_rows
from peftjax.transform.moments import change_moments

PARAMS = {"x": {"a": jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)}, "bias": jnp.ones(5), "t": jnp.ones(())}
ROWS = jnp.array([[True, False, False], [False, False, True]])


def gradient(step):
    return jax.tree.map(lambda p: jnp.sin(p + 1.7 * step), PARAMS)


def run(tx, steps, state=None, params=PARAMS, start=0):
    state, update = tx.init(params) if state is None else state, jax.jit(tx.update)
    for step in range(start, start + steps):
        updates, state = update(gradient(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_without_a_reset_it_is_the_usual_adamw():
    rate = optax.linear_schedule(0.1, 0.01, 4)
    got, _ = run(optim.row_adamw(rate, weight_decay=0.3), 5)
    want, _ = run(optax.adamw(rate, weight_decay=0.3), 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, want)


def test_counts_are_one_for_each_row():
    _, state = run(optim.scale_by_row_adam(), 2)
    assert jax.tree.map(jnp.shape, state.count) == {"x": {"a": (2, 3, 1)}, "bias": (1,), "t": ()}
    assert all((count == 2).all() for count in jax.tree.leaves(state.count))


def test_a_row_that_was_reset_goes_on_as_a_new_one_and_the_others_as_they_were():
    tx = optim.scale_by_row_adam()
    _, state = run(tx, 7)
    kept, _ = tx.update(gradient(7), state)
    state = change_moments(state, {("x", "a"): zero_rows(ROWS, caller="test")})
    updates, state = tx.update(gradient(7), state)
    fresh, _ = tx.update(gradient(7), tx.init(PARAMS))
    wanted = jnp.where(ROWS[..., None], fresh["x"]["a"], kept["x"]["a"])
    np.testing.assert_allclose(updates["x"]["a"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], kept["bias"])
    np.testing.assert_array_equal(state.count["x"]["a"][..., 0], jnp.where(ROWS, 1, 8))


@pytest.mark.slow
def test_one_count_for_all_makes_the_first_update_after_a_reset_too_large():
    tx = optax.scale_by_adam()
    _, state = run(tx, 5000)
    state = change_moments(state, {("x", "a"): zero_rows(ROWS, caller="test")})
    updates, _ = tx.update(gradient(0), state)
    size = jnp.abs(updates["x"]["a"])[ROWS]
    np.testing.assert_allclose(size, 0.1 / 0.001**0.5, rtol=0.01)


def test_numbers_that_rows_share_stay_and_quantized_ones_are_refused():
    zero = zero_rows(ROWS, caller="test")
    np.testing.assert_array_equal(zero("v_row", jnp.ones((2, 3))), ~ROWS)
    np.testing.assert_array_equal(zero("v_col", jnp.ones((2, 4))), 1.0)
    np.testing.assert_array_equal(zero("v", jnp.ones(1)), 1.0)
    with pytest.raises(PeftError, match="test: the optimizer keeps 'mu' as int8, whose rows cannot be reset"):
        zero("mu", jnp.ones((2, 3, 4), jnp.int8))


def test_moments_have_the_dtype_of_the_parameters_and_updates_that_of_gradients():
    params = {"w": jnp.ones((3, 4), jnp.bfloat16)}
    tx = optim.row_adamw(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == state[0].mu["w"].dtype == state[0].nu["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["w"].astype(jnp.float32), -0.1, rtol=0.01)
