"""ReLoRA: what a restart does to weights, factors and moments, in NumPy, and its learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretraining
import pytest
from pretraining import PARAMS, X, advanced, assert_same_end, merged, resumed
from support import assert_close

import peftjax as pj
from peftjax.core.errors import PeftError

UP, DOWN = "up/kernel", "blocks/down/weight"


def started(tx=None, **options):
    method = pj.relora(**{"rank": 3, "alpha": 6.0, "every": 4, **options})
    return pretraining.started(method, optax.adam(0.01) if tx is None else tx)


def found(state, kind):
    """The part of the optimizer's state of that kind."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next(node for node in nodes if isinstance(node, kind))


def pruned(values, share):
    """Zeros where the size is at most the quantile, of each matrix."""
    values = np.array(values)
    for at in np.ndindex(values.shape[:-2]):
        own = np.abs(values[at])
        values[at] = np.where(own > np.quantile(own, share), values[at], 0.0)
    return values


def test_a_restart_leaves_the_model_and_takes_new_factors():
    run, state = started()
    for _ in range(3):
        state, _ = run.step(state, X)
    before, model = jax.tree.map(jnp.copy, state), merged(run, state)
    after = advanced(run, before, 4)
    assert_close(merged(run, after), model, 1e-5)
    for path in (UP, DOWN):
        old, new = before.trainable[path], after.trainable[path]
        assert float(jnp.abs(old["b"]).max()) > 1e-3
        np.testing.assert_array_equal(new["b"], 0.0)
        assert float(jnp.abs(new["a"] - old["a"]).max()) > 1e-2
        bound = new["a"].shape[-1] ** -0.5
        assert 0.8 * bound < float(jnp.abs(new["a"]).max()) <= bound
        change = 2.0 * np.einsum("...ri,...ro->...io", old["a"], old["b"])
        change = change.swapaxes(-1, -2) if path == DOWN else change
        held = after.frozen.state[path]["weight"] - before.frozen.state[path]["weight"]
        np.testing.assert_allclose(held, change, atol=1e-6)
    unmoved = advanced(run, before, 3)
    jax.tree.map(np.testing.assert_array_equal, unmoved.trainable, before.trainable)


@pytest.mark.parametrize("share", [0.9, 0.5, 1.0])
def test_a_restart_prunes_the_moments(share):
    run, state = started(prune=share)
    for _ in range(2):
        state, _ = run.step(state, X)
    before = jax.tree.map(jnp.copy, state)
    after = advanced(run, before, 4)
    old, new = (found(s, optax.ScaleByAdamState) for s in (before, after))
    assert int(new.count) == int(old.count) == 2
    for kind in ("mu", "nu"):
        moments, left = getattr(old, kind), getattr(new, kind)
        for path in (UP, DOWN):
            for name in "ab":
                np.testing.assert_allclose(left[path][name], pruned(moments[path][name], share), rtol=1e-6)
        np.testing.assert_array_equal(left["norm/scale"]["value"], moments["norm/scale"]["value"])


def test_sums_of_gradients_of_old_factors_are_dropped():
    run, state = started(optax.MultiSteps(optax.adam(0.01), 3))
    state, _ = run.step(state, X)
    before = jax.tree.map(jnp.copy, state)
    old, new = (found(s, optax.MultiStepsState).acc_grads for s in (before, advanced(run, before, 4)))
    assert bool(old[UP]["b"].any())
    assert not bool(new[UP]["b"].any())
    np.testing.assert_array_equal(new["norm/scale"]["value"], old["norm/scale"]["value"])


def test_changes_add_up_to_a_higher_rank():
    run, state = started(optax.sgd(0.3), rank=1, every=2, train_rest=False)
    for _ in range(7):
        state, _ = run.step(state, X)
    change = np.asarray(merged(run, state)["up"]["kernel"] - PARAMS["up"]["kernel"])
    sizes = np.linalg.svd(change, compute_uv=False)
    assert (sizes > 1e-4 * sizes[0]).sum() >= 3


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    continued, whole = resumed(pj.relora(rank=3, every=3, targets=["layer"]), tmp_path)
    assert_same_end(continued, whole)


def test_the_learning_rate_begins_anew():
    """The released schedule, written out."""
    total, every, warm, again, least = 100, 20, 10, 4, 0.1
    rate = pj.optim.cosine_with_restarts(
        2.0, total_steps=total, every=every, warmup_steps=warm, restart_warmup_steps=again, least=least
    )

    def cosine(progress):
        return least + (1 - least) * 0.5 * (1 + np.cos(np.pi * progress))

    for step in range(total):
        within, number = step % every, step // every
        if step < warm:
            wanted = step / warm
        elif within < again:
            wanted = within / again * cosine(number * every / (total - warm))
        else:
            wanted = cosine((step - warm) / (total - warm))
        np.testing.assert_allclose(rate(step), 2.0 * wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"every": 0}, "every must be positive"), ({"prune": 0.0}, r"prune must be in \(0, 1\]")],
)
def test_a_setting_out_of_range(options, said):
    with pytest.raises(PeftError, match=f"relora: {said}"):
        pj.relora(**options)
    with pytest.raises(PeftError, match="leaves none of 5"):
        pj.optim.cosine_with_restarts(1.0, total_steps=5, every=2, warmup_steps=5)
