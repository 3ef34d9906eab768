"""A training loop of one's own: what a method does between steps, by `method.advance`."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretraining
import pytest
from pretraining import PARAMS, X, loss_of
from support import KEY, all_but_slow

import peftjax as pj
from peftjax.transform.registry import METHODS as REGISTERED
from peftjax.transform.transform import changing_state

README = Path(__file__).parents[2] / "README.md"
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
STEPS = 4
OWN = {"targets": ["up"], "train_rest": False}
ALONE = {
    "galore": pj.galore(rank=2, every=3, basis="svd"),
    "natural_galore": pj.natural_galore(rank=2, every=3, basis="svd"),
    "switchlora": pj.switchlora(rank=4, total_steps=1000, interval=3.0, freeze_steps=1),
    "lowrank_restarts": pj.lowrank_restarts(rank=3, every=3),
    "relora": pj.relora(rank=3, every=3),
    "snella": pj.snella(rank=2, total_steps=8, allocate_every=3, coefficient=1.0),
    "adalora": pj.adalora(rank=3, target_rank=2, total_steps=8, allocate_every=3),
    "sigma_reparam": pj.sigma_reparam(),
    "pst": pj.pst(rank=2, sparsity=0.5, total_steps=8, init_warmup=0, final_warmup=2, prune_every=3),
    "sara": pj.sara(density=0.2, reselect_at=3),
}
CHAINED = {
    "galore": pj.chain(pj.galore(rank=2, every=3, basis="svd", **OWN), pj.lora(rank=2, targets=["down"])),
    "switchlora": pj.chain(
        pj.unfreeze(["norm"]),
        pj.switchlora(rank=4, total_steps=1000, interval=3.0, freeze_steps=1, **OWN),
    ),
    "two": pj.chain(
        pj.sara(density=0.2, reselect_at=3, targets=["down"]),
        pj.snella(rank=2, total_steps=8, allocate_every=3, coefficient=1.0, targets=["up"]),
    ),
}
METHODS = {**ALONE, **{f"chain, {name}": method for name, method in CHAINED.items()}}
LOOPS = ("galore", "switchlora", "lowrank_restarts")


def run_readme(method):
    """What the README's own loop, as it stands there, leaves after a training of the method."""
    (loop,) = (code for code in CODE.findall(README.read_text(encoding="utf-8")) if "tx.update" in code)
    assert "advance" not in loop
    given = {"jax": jax, "optax": optax, "params": PARAMS, "batch": X, "loss": loss_of, "method": method}
    exec(loop, given)
    return given


def by_hand(method, tx, steps):
    """The README's loop with `method.advance`: `(frozen, trainable)` after the steps."""
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(tx)
    opt_state = tx.init(trainable)

    @jax.jit
    def step(frozen, trainable, opt_state, batch):
        grads = jax.grad(lambda t: loss_of(method.apply(frozen, t), batch))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable, frozen=frozen)
        return optax.apply_updates(trainable, updates), opt_state

    for number in range(steps):
        key = jax.random.fold_in(jax.random.fold_in(KEY, number + 1), 1)
        given = frozen, trainable, opt_state
        frozen, trainable, opt_state = method.advance(
            lambda params: loss_of(params, X), *given, step=number, key=key, tx=tx
        )
        trainable, opt_state = step(frozen, trainable, opt_state, X)
    return frozen, trainable


def test_every_method_that_advances_is_tested_here():
    found = {name for name, info in REGISTERED.items() if info.factory(**info.conformance.example).advances}
    assert found | {"sara"} == set(ALONE)


@pytest.mark.parametrize("name", all_but_slow([*ALONE, "chain, galore"], ("galore", "sara", "chain, galore")))
def test_the_readmes_loop_which_does_not_advance_is_told_so_at_its_first_apply(name):
    told = (
        r"between steps, and has not yet: train with pj\.training\(method, loss, tx\), "
        r"or call method\.advance\(loss, .*\) before each step"
    )
    with pytest.raises(pj.PeftError, match=told):
        run_readme(METHODS[name])


def test_the_readmes_loop_trains_a_method_that_does_not_advance():
    assert float(run_readme(pj.lora(rank=2))["value"]) < float(loss_of(PARAMS, X))


@pytest.mark.parametrize("name", all_but_slow([*LOOPS, "chain, two"], ("galore",)))
def test_a_loop_that_does_trains_what_pj_training_trains(name):
    method = METHODS[name]
    frozen, trainable = by_hand(method, optax.adam(0.01), STEPS)
    run, state = pretraining.started(method, optax.adam(0.01))
    for _ in range(STEPS):
        state, _ = run.step(state, X)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)  # two programs, so not bit by bit
    jax.tree.map(same, trainable, state.trainable)
    jax.tree.map(same, frozen, state.frozen)


@pytest.mark.parametrize("name", all_but_slow(METHODS, ("galore", "chain, switchlora")))
def test_it_changes_what_it_says_of_what_the_method_holds_and_nothing_else(name):
    method = METHODS[name]
    run, state = pretraining.started(method, optax.sgd(0.3))
    state, _ = run.step(state, X)
    frozen, given = state.frozen, jax.tree.map(np.array, state.frozen)

    @partial(jax.jit, static_argnames="step")
    def advance(state, batch, step):
        loss = lambda params: loss_of(params, batch)
        given = state.frozen, state.trainable, state.opt_state
        return method.advance(loss, *given, step=step, key=KEY, tx=run.tx)

    new = advance(state, X, 3)[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, given)  # nothing given is written over
    jax.tree.map(np.testing.assert_array_equal, new.params, frozen.params)
    assert new.plan == frozen.plan
    changing = {id(leaf) for leaf in jax.tree.leaves(changing_state(method, frozen.state))}
    moved = []
    for (path, old), now in zip(jax.tree.leaves_with_path(frozen.state), jax.tree.leaves(new.state)):
        assert (old.shape, old.dtype) == (now.shape, now.dtype)
        same = np.array_equal(old, now)
        assert same or id(old) in changing, path
        moved += [] if same else [path]
    assert bool(moved) == bool(changing)


@pytest.mark.parametrize("name", all_but_slow(METHODS, ("galore", "snella", "chain, switchlora")))
def test_it_changes_nothing_when_nothing_is_due(name):
    method = replace(METHODS[name], advances=tuple(a for a in METHODS[name].advances if not a.due(1)))
    run, state = pretraining.started(method, optax.sgd(0.3))
    after = method.advance(None, state.frozen, state.trainable, state.opt_state, step=1, key=KEY, tx=run.tx)
    before = (replace(state.frozen, advanced=True), state.trainable, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_method_without_advances_may_be_advanced_too():
    method = pj.lora(rank=2)
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.sgd(0.1))
    after = method.advance(None, frozen, trainable, tx.init(trainable), step=0, key=KEY, tx=tx)
    assert after[0] == frozen
    assert after[1] is trainable
    assert jnp.isfinite(loss_of(method.apply(*after[:2]), X))
