"""The two entrances of the projected optimizers, a Transform and a plain optax transformation, agree."""

import jax
import jax.numpy as jnp
import optax
import pretraining
import pytest
from support import all_but_slow
from test_galore import BATCHES, EVERY, PARAMS, RATE, loss_of, trained

import peftjax as pj
from peftjax.core.errors import PeftError


def plainly(tx, batches=BATCHES):
    """The weights of a run of the plain transformation on whole gradients."""

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for batch in batches:
        params, state = step(params, state, batch)
    return params


SAME = {"rank": 2, "every": EVERY, "basis": "svd", "moments": "reset"}


def close(left, right, tolerance):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("order", ["optax", "released"])
def test_galore_is_the_same_method_by_both(order):
    """Bases are those of one gradient, moments begin anew with them, and weights decay, in both orders."""
    decay = {"weight_decay": 0.1, "eps": 1e-6}
    inner = pj.optim.adamw(RATE, order=order, **decay)
    got, _ = trained(pj.galore(**SAME), inner)
    assert close(got[-1], plainly(pj.optim.galore(RATE, order=order, **SAME, **decay)), 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", all_but_slow(("paper", "released"), ("paper",)))
def test_natural_galore_is_the_same_method_by_both(variant):
    options = {**SAME, "variant": variant, "history": 3, "damping": 0.1}
    got, _ = trained(pj.natural_galore(**options), optax.adam(RATE))
    want = plainly(pj.optim.natural_galore(RATE, order="optax", **options))
    # Of one side the history hardly matters here; with both it does, and so does the rounding of its inverse.
    tolerance = {"paper": 3e-4, "released": 1e-3}[variant]
    assert close(got[-1], want, tolerance)
    galore, _ = trained(pj.galore(**SAME), optax.adam(RATE))
    assert not close(got[-1], galore[-1], 3 * tolerance)


@pytest.mark.slow
def test_moments_in_eight_bits_inside_and_reset_with_the_bases():
    eight = pj.optim.eight_bit(optax.adam(RATE), min_size=8)
    got, state = trained(pj.galore(**SAME), eight)
    want, _ = trained(pj.galore(**SAME), optax.adam(RATE))
    change, wanted = (jax.tree.map(jnp.subtract, weights[-1], PARAMS) for weights in (got, want))
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, change, wanted)) / optax.tree.norm(wanted)
    assert 0.0 < float(gap) < 0.2
    codes = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.uint8]
    assert codes
    _, reset = trained(pj.galore(**SAME), eight, BATCHES[:1])
    assert len(jax.tree.leaves(reset.opt_state)) == len(jax.tree.leaves(state.opt_state))


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(("galore", "natural_galore"), ("galore",)))
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, name):
    """Interrupted between two refreshes, and refreshed again after it."""
    made = getattr(pj, name)(rank=4, every=4, targets=["layer"], basis="subspace")
    continued, whole = pretraining.resumed(made, tmp_path)
    pretraining.assert_same_end(continued, whole)
    assert float(jnp.abs(whole.trainable["layer/kernel"]["z"]).max()) > 0


def test_a_history_is_not_rotated():
    with pytest.raises(PeftError, match="natural_galore: a history cannot be rotated"):
        pj.natural_galore(moments="rotate")
    with pytest.raises(PeftError, match="variant must be one of paper, released, got 'both'"):
        pj.natural_galore(variant="both")
