"""The released AdamW against its equations in NumPy's float64, in torch's operations, and beside optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_checks import (
    PARAMS,
    assert_keeps_dtypes,
    assert_moves_as,
    assert_resumes,
    assert_sharded_equals_one_device,
    random_like,
    train,
)
from support import assert_close

import peftjax as pj
from peftjax.testing import check_optimizer

SCHEDULE = optax.linear_schedule(1e-2, 2e-3, 4)
W = {"w": PARAMS["head"]["kernel"]}


def released_loop(w, rates, decay, b1=0.9, b2=0.999, eps=1e-6):
    w = np.asarray(w, np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, rate in enumerate(rates, 1):
        g = np.asarray(random_like(W, 99 + t)["w"], np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        w = w - rate * decay * w
    return w


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_follows_its_equations_with_a_schedule_and_decay(eps):
    got, _ = train(pj.optim.adamw(SCHEDULE, eps=eps, weight_decay=0.5), W, range(5))
    rates = [float(SCHEDULE(t)) for t in range(5)]
    np.testing.assert_allclose(got["w"], released_loop(W["w"], rates, 0.5, eps=eps), rtol=1e-6, atol=1e-7)


@pytest.mark.parity
def test_follows_its_equations_in_torch():
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(np.array(W["w"]))
    m, v, rate, decay = torch.zeros_like(w), torch.zeros_like(w), 1e-2, 0.1
    for t in range(1, 5):
        g = torch.from_numpy(np.array(random_like(W, 99 + t)["w"]))
        m.mul_(0.9).add_(g, alpha=1.0 - 0.9)
        v.mul_(0.999).addcmul_(g, g, value=1.0 - 0.999)
        step = rate * (1.0 - 0.999**t) ** 0.5 / (1.0 - 0.9**t)
        w.addcdiv_(m, v.sqrt().add_(1e-6), value=-step)
        w.add_(w, alpha=-rate * decay)
    got, _ = train(pj.optim.adamw(rate, weight_decay=decay), W, range(4))
    np.testing.assert_allclose(got["w"], w.numpy(), rtol=1e-6, atol=1e-7)


def test_its_eps_counts_31_times_as_much_at_first_as_that_of_optax():
    grads = {"w": jnp.full(3, 1e-5)}
    # √v = √0.001 g at t = 1, of which the corrections make g: m / √v = 1 for eps = 0.
    released, optax_s = (
        pj.optim.adamw(1.0, eps=1e-6, order=order).update(
            grads, pj.optim.adamw(1.0, order=order).init(grads), {"w": jnp.zeros(3)}
        )[0]["w"]
        for order in ("released", "optax")
    )
    eps_by_gradient = lambda update: 1 / -float(update[0]) - 1
    assert eps_by_gradient(optax_s) == pytest.approx(0.1, rel=1e-3)
    assert eps_by_gradient(released) / eps_by_gradient(optax_s) == pytest.approx(0.001**-0.5, rel=1e-3)


def test_the_order_of_optax_is_optax():
    options = {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
    got = train(pj.optim.adamw(SCHEDULE, order="optax", **options), PARAMS, range(3))
    want = train(optax.adamw(SCHEDULE, **options), PARAMS, range(3))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_without_decay_and_eps_both_orders_agree():
    assert_moves_as(pj.optim.adamw(1e-2, eps=0.0), optax.adam(1e-2, eps=0.0), tolerance=1e-5)


def test_the_pieces_may_leave_parameters_out_of_the_decay():
    rate, decay = 0.1, 0.5
    mask = jax.tree.map(lambda leaf: leaf.ndim > 2, PARAMS)
    tx = optax.chain(
        pj.optim.scale_by_released_adam(),
        optax.scale_by_learning_rate(rate),
        optax.masked(pj.optim.decay_updated_weights(rate, decay), mask),
    )
    plain, _ = train(pj.optim.adamw(rate), PARAMS, range(1))
    want = jax.tree.map(lambda w, decays: w * (1 - rate * decay * decays), plain, mask)
    assert_close(train(tx, PARAMS, range(1))[0], want, 1e-6)


def test_hyperparameters_may_be_injected():
    tx = optax.inject_hyperparams(pj.optim.adamw)(learning_rate=SCHEDULE, weight_decay=0.1)
    assert_moves_as(tx, pj.optim.adamw(SCHEDULE, weight_decay=0.1), tolerance=2e-5)


def test_averages_may_be_wider_than_the_parameters():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), W)
    state = pj.optim.adamw(1e-2, state_dtype="float32").init(half)[0]
    assert {leaf.dtype for leaf in (state.mu["w"], state.nu["w"])} == {jnp.dtype("float32")}
    assert_keeps_dtypes(pj.optim.adamw(1e-2, weight_decay=0.1, state_dtype="float32"))


@pytest.mark.slow
def test_works_inside_optax_sharded_and_resumed(tmp_path):
    tx = pj.optim.adamw(SCHEDULE, weight_decay=0.1)
    check_optimizer(tx)
    assert_sharded_equals_one_device(tx)
    assert_resumes(tx, tmp_path)


def test_errors_name_the_remedy():
    with pytest.raises(pj.PeftError, match="order must be one of released, optax, got 'torch'"):
        pj.optim.adamw(1e-3, order="torch")
    with pytest.raises(pj.PeftError, match="leave out state_dtype"):
        pj.optim.adamw(1e-3, order="optax", state_dtype="float32")
    tx = pj.optim.adamw(1e-3)
    with pytest.raises(pj.PeftError, match="give the parameters too"):
        tx.update(W, tx.init(W))
