"""Projected methods whose steps are put into the weights one by one, so that no Z lies between them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretraining
import pytest
from support import KEY, all_but_slow, assert_close
from test_galore import BATCHES, DECAY, EVERY, PARAMS, RANK, RATE, galore, loss_of, started, trained

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.train.step import divided

DECAYED = {
    "optax": optax.adamw(RATE, weight_decay=DECAY),
    "released": pj.optim.adamw(RATE, weight_decay=DECAY, eps=1e-6),
    "momentum": optax.chain(optax.trace(0.9), optax.add_decayed_weights(DECAY), optax.scale(-RATE)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "inner"),
    [
        ("smaller", DECAYED["optax"]),
        ("output", DECAYED["released"]),
        # Not Adam: P G Qᵀ is diagonal but for rounding at a refresh, and Adam's step is as long for rounding.
        ("both", DECAYED["momentum"]),
    ],
)
def test_the_weights_are_those_of_steps_gathered_until_the_refresh(side, inner):
    got, _ = trained(galore(side=side, write="step"), inner)
    want, _ = trained(galore(side=side), inner)
    for ours, theirs in zip(got, want):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.slow
def test_natural_galore_too():
    options = {"rank": RANK, "every": EVERY, "basis": "svd", "history": 3, "damping": 0.1}
    got, _ = trained(pj.natural_galore(**options, write="step"), optax.adam(RATE))
    want, _ = trained(pj.natural_galore(**options), optax.adam(RATE))
    assert_close(got[-1], want[-1], 1e-4)


def test_between_steps_there_is_the_weight_and_its_projector_only():
    method = galore(write="step")
    _, trainable = method.init(KEY, PARAMS)
    _, state = trained(method, optax.adam(RATE))
    assert jax.tree.structure(state.trainable) == jax.tree.structure(trainable)
    assert state.trainable["up/kernel"] == state.trainable["down/kernel"] == {}
    assert set(state.frozen.state["up/kernel"]) == {"weight", "p"}
    assert set(state.frozen.state["down/kernel"]) == {"weight", "q"}
    opened = method.open(state.frozen, state.trainable)
    gathered = galore().init(KEY, PARAMS)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes((opened[0].state, opened[1])) == shapes((gathered[0].state, gathered[1]))
    closed = method.close(*opened)
    jax.tree.map(np.testing.assert_array_equal, closed, (state.frozen, state.trainable))


@pytest.mark.slow
def test_steps_of_accumulation_leave_the_weights_bit_by_bit():
    tx = optax.MultiSteps(optax.adam(RATE), every_k_schedule=2)
    weights, _ = trained(galore(write="step", every=100), tx, BATCHES[:4])
    wanted, _ = trained(galore(every=100), tx, BATCHES[:4])
    assert_close(weights[-1], wanted[-1], 1e-5)
    jax.tree.map(np.testing.assert_array_equal, weights[0], PARAMS)
    jax.tree.map(np.testing.assert_array_equal, weights[2], weights[1])
    assert float(jnp.abs(weights[1]["up"]["kernel"] - weights[0]["up"]["kernel"]).max()) > 1e-3


@pytest.mark.slow
def test_moments_in_eight_bits():
    tx = pj.optim.eight_bit(optax.adam(RATE), min_size=8)
    got, state = trained(galore(write="step"), tx, BATCHES[:5])
    want, _ = trained(galore(), tx, BATCHES[:5])
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(state.opt_state))
    assert_close(got[-1], want[-1], 1e-4)


@pytest.mark.slow
def test_bfloat16_weights_are_rounded_at_each_step_and_not_otherwise():
    """By momentum, between two refreshes: Adam and new bases make much of a rounding."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tx, batches = optax.sgd(0.3, momentum=0.9), BATCHES[:EVERY]
    got, state = trained(galore(write="step", dtype="bfloat16"), tx, batches, params)
    want, _ = trained(galore(), tx, batches)
    held = jax.tree.leaves((state.frozen, state.trainable))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in held)
    change, wanted = (
        jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, weights[-1], start)
        for weights, start in ((got, params), (want, PARAMS))
    )
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, change, wanted)) / optax.tree.norm(wanted)
    assert 0.0 < float(gap) < 0.02


@pytest.mark.slow
def test_in_a_chain():
    def both(write):
        inside = galore(write=write, targets=["up"], train_rest=False)
        return pj.chain(inside, pj.lora(rank=2, targets=["down"]))

    tx = optax.adamw(RATE, weight_decay=DECAY)
    got, state = trained(both("step"), tx)
    want, _ = trained(both("refresh"), tx)
    assert_close(got[-1], want[-1], 1e-5)
    assert state.trainable["galore"]["up/kernel"] == {}
    assert set(state.frozen.state["galore"]["up/kernel"]) == {"weight", "p"}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(("galore", "natural_galore"), ("galore",)))
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, name):
    made = getattr(pj, name)(rank=4, every=4, targets=["layer"], basis="subspace", write="step")
    continued, whole = pretraining.resumed(made, tmp_path)
    pretraining.assert_same_end(continued, whole)
    assert whole.trainable["layer/kernel"] == {}
    assert set(whole.frozen.state["layer/kernel"]) == {"weight", "p"}


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_device():
    auto = {"axis_types": (jax.sharding.AxisType.Auto,) * 2, "devices": jax.devices()[:4]}
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), **auto)

    def put(leaf):
        spec = [None] * (leaf.ndim - 2) + ["data", "tensor"] if leaf.ndim > 1 else []
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

    spread = jax.tree.map(put, PARAMS)
    got, state = trained(galore(write="step"), optax.adam(RATE), params=spread)
    want, _ = trained(galore(write="step"), optax.adam(RATE))
    assert_close(jax.device_get(got[-1]), want[-1], 1e-5)
    assert not state.frozen.state["up/kernel"]["weight"].sharding.is_fully_replicated


def test_a_loop_that_does_not_open_is_told_so():
    method = galore(write="step")
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.adam(RATE))
    told = r"begin each step, .* frozen, trainable = method.open\(frozen, trainable\), and end a step with"
    with pytest.raises(PeftError, match=told):
        tx.init(trainable)
    state = tx.init(method.open(frozen, trainable)[1])
    frozen = replace(frozen, advanced=True)
    grads = jax.grad(lambda t: loss_of(method.apply(frozen, t), BATCHES[0]))(trainable)
    with pytest.raises(PeftError, match=told):
        tx.update(grads, state, trainable, frozen=frozen)
    with pytest.raises(PeftError, match="write must be one of refresh, step, got 'never'"):
        galore(write="never")


@pytest.mark.slow
def test_a_loop_that_opens_and_closes_by_hand_trains_what_pj_training_trains():
    method, batches = galore(write="step"), BATCHES[: EVERY + 1]
    tx = method.optimizer(optax.adam(RATE))
    frozen, trainable = method.init(KEY, PARAMS)
    state = tx.init(method.open(frozen, trainable)[1])

    @jax.jit
    def step(frozen, trainable, state, batch):
        frozen, trainable = method.open(frozen, trainable)
        grads = jax.grad(lambda t: loss_of(method.apply(frozen, t), batch))(trainable)
        updates, state = tx.update(grads, state, trainable, frozen=frozen)
        return *method.close(frozen, optax.apply_updates(trainable, updates)), state

    for number, batch in enumerate(batches):
        loss, given = (lambda params, batch=batch: loss_of(params, batch)), (frozen, trainable, state)
        frozen, trainable, state = method.advance(loss, *given, step=number, key=KEY, tx=tx)
        assert trainable["up/kernel"] == {}
        frozen, trainable, state = step(frozen, trainable, state, batch)
    wanted, _ = trained(method, optax.adam(RATE), batches)
    assert_close(method.merge(frozen, trainable), wanted[-1], 1e-5)


@pytest.mark.slow
def test_a_step_is_given_less_by_what_z_has():
    """Weights, gradients and moments are the same; the compiled step has no argument for Z and the factor."""

    def arguments(method):
        run, state = started(method, optax.adam(RATE))
        moved, fixed = divided(replace(state.frozen, advanced=True), run.moves)
        step = jax.jit(run.run_step)
        lowered = step.lower(state.trainable, state.opt_state, moved, fixed, BATCHES[0], KEY)
        return lowered.compile().memory_analysis().argument_size_in_bytes

    gathered = galore().init(KEY, PARAMS)[1]
    z = sum(
        leaf.nbytes for path, leaf in tree.named_leaves(gathered).items() if path.endswith(("/z", "/shrink"))
    )
    assert z > 0
    assert arguments(galore()) - arguments(galore(write="step")) == z
