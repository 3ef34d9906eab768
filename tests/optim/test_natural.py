"""The natural gradient against its definition in NumPy's float64, and Natural GaLore around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizing
import pytest
from support import KEY, assert_close

from peftjax.core.errors import PeftError
from peftjax.optim._galore import galore
from peftjax.optim.natural import natural_galore, scale_by_natural_gradient

RANDOM = np.random.default_rng(0)
K, S = 40, 5


def after(gradients, history=S, damping=1e-3, **options):
    """g~ of the last of some gradients, and the state."""
    tx = scale_by_natural_gradient(history, damping, **options)
    state = tx.init({"w": jnp.zeros_like(jnp.asarray(gradients[0]))})
    update = jax.jit(tx.update)
    for gradient in gradients:
        made, state = update({"w": jnp.asarray(gradient, jnp.float32)}, state)
    return np.asarray(made["w"], np.float64), state


def columns(norm2, n=S, k=K):
    """Random vectors of a squared norm, as float32 rounds them."""
    drawn = RANDOM.normal(size=(n, k))
    return (drawn * np.sqrt(norm2) / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def explicit(rows, damping=1e-3):
    """(λ I + H Hᵀ)⁻¹ g in float64."""
    h = np.asarray(rows, np.float64).T
    return np.linalg.solve(damping * np.eye(len(h)) + h @ h.T, h[:, -1])


def test_the_form_without_cancellation_is_the_definition():
    h = columns(0.4).astype(np.float64).T
    short = h @ np.linalg.solve(1e-3 * np.eye(S) + h.T @ h, np.eye(S)[-1])
    np.testing.assert_allclose(short, explicit(h.T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("norm2", "tolerance"), [(4e-5, 1e-6), (0.4, 1e-6), (4e3, 3e-5)])
def test_float32_equals_the_definition(norm2, tolerance):
    """At 4e3 the damping is below 1e-6 of the trace, which is taken instead."""
    rows = columns(norm2)
    wanted = explicit(rows)
    assert np.linalg.norm(after(rows)[0] - wanted) < tolerance * np.linalg.norm(wanted)


def test_the_released_formula_agrees_for_small_gradients_and_is_lost_for_large_ones():
    errors = {}
    for norm2 in (4e-5, 4e3):
        rows = columns(norm2)
        h = rows.T
        inside = np.eye(S, dtype=np.float32) + h.T @ h / np.float32(1e-3)
        z = np.linalg.solve(inside, h.T @ h[:, -1])
        released = h[:, -1] / np.float32(1e-3) - h @ z / np.float32(1e-6)
        mine = after(rows)[0]
        errors[norm2] = np.linalg.norm(released - mine) / np.linalg.norm(mine)
    assert errors[4e-5] < 1e-5
    assert errors[4e3] > 0.1


def test_the_ring_forgets_what_is_older_than_its_slots():
    rows = columns(0.4, 3 * S + 2)
    np.testing.assert_allclose(after(rows)[0], explicit(rows[-S:]), rtol=1e-4, atol=1e-6)


def test_the_gram_matrix_is_that_of_the_slots():
    _, state = after(columns(0.4, 2 * S + 3))
    held = np.asarray(state.history["w"], np.float64)
    np.testing.assert_allclose(state.gram["w"], held @ held.T, atol=1e-6)


def test_one_slot_divides_by_damping_plus_the_squared_norm():
    (g,) = columns(0.4, 1)
    np.testing.assert_allclose(after([g], history=1)[0], g / (1e-3 + np.sum(g**2)), rtol=1e-5)


def test_empty_slots_change_nothing():
    rows = columns(0.4, 2)
    np.testing.assert_allclose(after(rows, history=9)[0], after(rows, history=2)[0], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_comes_twice_counts_twice():
    (g,) = columns(0.4, 1)
    np.testing.assert_allclose(after([g, g])[0], g / (1e-3 + 2 * np.sum(g**2)), rtol=1e-3)


def test_a_large_damping_recovers_the_gradient():
    rows = columns(0.4)
    np.testing.assert_allclose(1e5 * after(rows, damping=1e5)[0], rows[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm2", [1e-30, 1.0, 4e3, 1e8, 1e20])
@pytest.mark.parametrize("jitter", [0.0, 1e-7, 1e-3])
def test_gradients_that_repeat_give_finite_steps_no_longer_than_those_of_one(norm2, jitter):
    """Cholesky with the damping itself gives NaN for some of these."""
    g = columns(norm2, 1)[0]
    rows = [g * (1 + jitter * RANDOM.normal(size=K)).astype(np.float32) for _ in range(12)]
    made = after(rows, history=8)[0]
    assert np.isfinite(made).all()
    if jitter == 0.0:
        assert np.linalg.norm(made) <= np.linalg.norm(g) / (1e-3 + np.sum(g.astype(np.float64) ** 2))


def test_zero_gradients_stay_zero():
    made, _ = after(np.zeros((7, K), np.float32))
    np.testing.assert_array_equal(made, 0.0)


def test_every_matrix_of_a_stack_has_its_own_history():
    rows = RANDOM.normal(size=(7, 2, 3, 4, 5)).astype(np.float32)
    made, state = after(list(rows))
    assert state.history["w"].shape == (2, 3, S, 4, 5)
    np.testing.assert_allclose(made[1, 2], after(list(rows[:, 1, 2]))[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        made[1, 2].ravel(), explicit(rows[-S:, 1, 2].reshape(S, 20)), rtol=1e-3, atol=1e-5
    )


def test_the_stack_can_be_given():
    rows = list(RANDOM.normal(size=(3, 4, 5)).astype(np.float32))
    made, state = after(rows, stack_of=lambda path, leaf: 1)
    assert state.history["w"].shape == (4, S, 5)
    np.testing.assert_allclose(made[2], after([row[2] for row in rows])[0], rtol=1e-4, atol=1e-6)


def test_a_bfloat16_history_halves_its_bytes_and_uses_what_it_holds():
    rows = columns(0.4)
    made, state = after(rows, dtype=jnp.bfloat16)
    assert state.history["w"].dtype == jnp.bfloat16
    rounded = np.asarray(jnp.asarray(rows).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(made, explicit(rounded), rtol=1e-3, atol=1e-5)


# Natural GaLore.

SHAPES = {"up": (2, 6, 10), "down": (2, 10, 6)}


def tree_of(step):
    keys = jax.random.split(jax.random.fold_in(KEY, step), 3)
    kernels = {name: {"kernel": jax.random.normal(k, s)} for (name, s), k in zip(SHAPES.items(), keys)}
    return {**kernels, "head": {"kernel": jax.random.normal(keys[2], (6, 4))}}


RATES = optax.linear_schedule(0.1, 0.0, 9)
PARAMS, GRADS = tree_of(99), [tree_of(step) for step in range(8)]


def train(tx, steps=5):
    return optimizing.train(tx, PARAMS, GRADS[:steps])[:2]


def natural_state(state):
    return state[0].inner[0].inner_state


@pytest.mark.parametrize(("variant", "matrix"), [("paper", (3, 10)), ("released", (3, 3))])
def test_the_history_is_of_projected_gradients_only(variant, matrix):
    _, state = train(natural_galore(0.1, rank=3, variant=variant, history=4), 2)
    history = natural_state(state).history
    assert history["up"]["kernel"].shape == (2, 4, *matrix)
    assert isinstance(history["head"]["kernel"], optax.MaskedNode)


def test_it_is_the_natural_gradient_inside_the_projection():
    """The first step: one slot in use, so R / (λ + ‖R‖²), and Adam's step of it."""
    tx = natural_galore(0.1, rank=3, scale=1.0, eps=1e-12)
    params, state = train(tx, 1)
    basis = state[0].bases["up/kernel"]["input"]
    r = basis @ GRADS[0]["up"]["kernel"]
    step = jnp.swapaxes(basis, 1, 2) @ jnp.sign(r)
    np.testing.assert_allclose(params["up"]["kernel"], PARAMS["up"]["kernel"] - 0.1 * step, atol=1e-4)
    held = natural_state(state).history["up"]["kernel"]
    np.testing.assert_allclose(held[:, 0], r, atol=1e-5)


@pytest.mark.slow
def test_a_large_damping_is_galore():
    """Adam does not see the scale of its gradients when eps is far below them."""
    natural = train(natural_galore(0.1, rank=3, every=2, damping=1e7, eps=1e-20))[0]
    assert_close(natural, train(galore(0.1, rank=3, every=2, eps=1e-12))[0], 1e-4)
    apart = train(natural_galore(0.1, rank=3, every=2, eps=1e-20))[0]
    assert float(jnp.abs(apart["up"]["kernel"] - natural["up"]["kernel"]).max()) > 1e-2


def test_both_sides_are_those_of_one_decomposition():
    _, state = train(natural_galore(0.1, rank=3, variant="released"), 1)
    u, _, vh = np.linalg.svd(np.asarray(GRADS[0]["up"]["kernel"]), full_matrices=False)
    found = state[0].bases["up/kernel"]
    for mine, wanted in ((found["input"], np.swapaxes(u, 1, 2)[:, :3]), (found["output"], vh[:, :3])):
        np.testing.assert_allclose(np.abs(np.sum(mine * wanted, -1)), 1.0, atol=1e-5)


def test_a_reset_clears_the_history_and_a_rotation_is_refused():
    _, state = train(natural_galore(0.1, rank=3, every=3, moments="reset", history=5), 4)
    filled = jnp.abs(natural_state(state).history["up"]["kernel"]).max((0, 2, 3)) > 0
    assert filled.tolist() == [False, False, False, True, False]
    with pytest.raises(PeftError, match="'history' of 'down/kernel'"):
        natural_galore(0.1, rank=3, moments="rotate").init(PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_sharded(variant):
    tx = natural_galore(0.01, rank=3, variant=variant, every=2)
    optimizing.assert_same_when_sharded(tx, PARAMS, GRADS[:4], 2e-5)


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit_from_its_checkpoint(tmp_path):
    tx = natural_galore(RATES, rank=3, every=2, history=2, weight_decay=0.1)
    optimizing.assert_resumes(tx, PARAMS, GRADS[:6], tmp_path)


def test_options_out_of_range():
    for options in ({"history": 0}, {"damping": 0.0}):
        with pytest.raises(PeftError, match=r"must be (positive|1.* or more), got"):
            scale_by_natural_gradient(**options)
    with pytest.raises(PeftError, match="variant must be one of paper, released, got 'tucker'"):
        natural_galore(0.1, rank=3, variant="tucker")
