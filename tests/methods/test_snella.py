"""SNELLA's map and its training with a budget; the budget's arithmetic is in test_budget.py."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, normal, quick_at
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core.errors import PeftError
from peftjax.io import checkpoint
from peftjax.transform.transform import changing_state, with_changing_state

L, N, M = 2, 12, 8
STACK = normal(KEY, (L, N, M))
PARAMS = {
    "blocks": {"up": {"kernel": STACK}},
    "down": {"kernel": STACK[0].T},
    "head": {"kernel": jnp.ones((N, 3))},
}
X = normal(jax.random.key(1), (5, N))


def forward(params, x):
    def block(h, w):
        return h + jnp.tanh(x @ w), None

    h, _ = jax.lax.scan(block, jnp.zeros((len(x), M)), params["blocks"]["up"]["kernel"])
    return h @ params["down"]["kernel"] @ params["head"]["kernel"]


def make(**options):
    given = {"total_steps": 20, "allocate_every": 5, "rank": 4, "coefficient": 1.0, "sparsity": 0.6}
    return pj.snella(**{**given, **options})


def begun(method, params=PARAMS):
    """As a loop that has advanced the method starts its first step."""
    frozen, trainable = method.init(KEY, params)
    return replace(frozen, advanced=True), trainable


def training_of(method, tx):
    return pj.training(method, lambda params, x: jnp.sum(jnp.sin(pj.adapt(forward)(params, x))), tx)


def run(training, state, steps):
    """The state after the steps, and the levels in each of them."""
    seen = []
    for n in steps:
        assert state.step == n
        state, _ = training.step(state, X * (1 + n % 3))
        seen.append(levels_of(state))
    return state, seen


def levels_of(state):
    own = state.frozen.state.get("snella", state.frozen.state)
    return np.concatenate([np.asarray(own[path]["sparsity"]).reshape(-1) for path in sorted(own)])


def update(method, frozen, trainable):
    return method.merge(frozen, trainable)["blocks"]["up"]["kernel"] - STACK


def with_slots(trainable, **values):
    """The trainable with some slots of every weight filled with numbers."""
    return {
        path: {
            name: jnp.full_like(slot, values[name]) if name in values else slot
            for name, slot in slots.items()
        }
        for path, slots in trainable.items()
    }


def with_levels(frozen, level):
    return replace(frozen, state=with_slots(frozen.state, sparsity=level))


# The map.


@pytest.mark.slow
def test_without_its_second_term_it_is_snell():
    method, snell = make(initial_sparsity=0.3), pj.snell(rank=4, sparsity=0.3, coefficient=1.0)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = with_slots(moved(trainable), alpha=0.0, beta=0.0)
    factors = {path: {name: slots[name] for name in "ab"} for path, slots in trainable.items()}
    assert_close(update(method, frozen, trainable), update(snell, snell.init(KEY, PARAMS)[0], factors))


def test_the_second_term_is_a_softmax_over_outputs_and_a_constant():
    method = make(mode="none")
    frozen, trainable = method.init(KEY, PARAMS)
    alone = update(method, frozen, with_slots(trainable, alpha=0.0, beta=0.0))
    both = update(method, frozen, with_slots(trainable, alpha=3.0, gamma=0.2, beta=0.5))
    assert_close(both, alone + 3.0 * jax.nn.softmax(alone / 0.2, axis=-1) + 0.5)
    flat = update(method, frozen, with_slots(trainable, alpha=1.0, gamma=1e6, beta=0.0))
    assert_close(flat, alone + 1 / M)


def test_the_start_is_the_released_one():
    frozen, trainable = make().init(KEY, PARAMS)
    slots = trainable["blocks/up/kernel"]
    assert set(slots) == {"a", "b", "alpha", "gamma", "beta"}
    for name, value in {"alpha": 1.0, "gamma": 1.0, "beta": 0.0}.items():
        np.testing.assert_array_equal(slots[name], np.full(L, value))
    level = frozen.state["blocks/up/kernel"]["sparsity"]
    np.testing.assert_array_equal(level, np.full(L, 0.01, np.float32))


# Training.


@pytest.mark.slow
def test_the_budget_is_met_in_every_step_and_nothing_is_compiled_again():
    method = make(initial_sparsity=0.1)
    training = training_of(method, optax.adam(0.01))
    after, seen = run(training, training.start(KEY, PARAMS), range(20))
    assert training._stepped._cache_size() == 1
    assert [advance._cache_size() for advance in training._advanced] == [1]
    wanted = [0.4 + 0.5 * (1 - (step // 5) / 3) ** 3 for step in range(20)]
    np.testing.assert_allclose([(1 - levels).mean() for levels in seen], wanted, rtol=1e-5)
    assert np.ptp(seen[-1]) > 0.01
    zeros = (update(method, after.frozen, after.trainable) == 0).sum((1, 2))
    levels = after.frozen.state["blocks/up/kernel"]["sparsity"]
    np.testing.assert_allclose(zeros, levels * N * M, atol=1.01)


@pytest.mark.slow
def test_in_a_chain_the_rest_is_trained_as_without_it():
    method = pj.chain(make(), pj.unfreeze(["head"]))
    training = training_of(method, optax.adamw(0.01, weight_decay=0.1))
    state = training.begin(*method.init(KEY, PARAMS), KEY)
    first = levels_of(state)
    state, seen = run(training, state, range(4))
    assert float(jnp.abs(state.trainable["unfreeze"]["head/kernel"] - 1.0).min()) > 1e-3
    state, more = run(training, state, range(4, 5))
    assert all(np.array_equal(levels, first) for levels in [*seen, *more])
    state, _ = run(training, state, range(5, 6))
    assert float(state.frozen.state["snella"]["down/kernel"]["sparsity"]) > 0.02


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_bit_exactly(tmp_path):
    method = make()
    training = training_of(method, optax.adam(0.01))
    half, _ = run(training, training.start(KEY, PARAMS), range(7))

    def saved(state):
        both = {"trainable": state.trainable, "state": changing_state(method, state.frozen.state)}
        return checkpoint.RunState(both, state.opt_state, state.key, state.step, {}, {})

    fresh = training.start(KEY, PARAMS)
    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoint.save(checkpoints, saved(half))
        found = checkpoint.restore_latest(checkpoints, saved(fresh))
    held = with_changing_state(fresh.frozen.state, found.trainable["state"])
    again = replace(
        fresh,
        step=found.step,
        frozen=replace(fresh.frozen, state=held),
        trainable=found.trainable["trainable"],
        opt_state=found.opt_state,
        key=found.key,
    )
    before = levels_of(half)
    got, wanted = (run(training, state, range(7, 16))[0] for state in (again, half))
    jax.tree.map(np.testing.assert_array_equal, got.trainable, wanted.trainable)
    jax.tree.map(np.testing.assert_array_equal, got.opt_state, wanted.opt_state)
    np.testing.assert_array_equal(levels_of(got), levels_of(wanted))
    assert not np.array_equal(levels_of(got), before)


def test_without_a_sparsifier_there_is_no_level_and_nothing_is_done_to_it():
    method = make(mode="none")
    frozen, trainable = method.init(KEY, PARAMS)
    assert set(trainable["down/kernel"]) == {"a", "b", "alpha", "gamma", "beta"}
    assert not any(frozen.state.values())
    assert (method.around, method.advances) == (None, ())
    tx = optax.sgd(0.1)
    assert method.optimizer(tx).init(trainable) == tx.init(trainable)
    assert method.apply(frozen, trainable)["down"]["kernel"].threshold is None


@pytest.mark.slow
def test_factors_and_scores_sharded_over_eight_devices_give_the_levels_of_one():
    method = make(rank=8, allocate_every=2)
    frozen, trainable = method.init(KEY, PARAMS)
    training = training_of(method, optax.sgd(0.01))
    want, before = run(training, training.begin(frozen, trainable, KEY), range(2))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = {"a": P(None, None, "fsdp"), "b": P(None, None, "tensor")}

    def place(path, leaf):
        spec = sharded.get(path[-1].key, P())
        return jax.device_put(leaf, NamedSharding(mesh, P(*(None,) * (leaf.ndim - len(spec)), *spec)))

    spread = jax.tree_util.tree_map_with_path(place, trainable)
    base = {"up": P(None, "fsdp", "tensor"), "down": P("tensor", "fsdp"), "head": P()}
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, base[path[-2].key])), PARAMS
    )
    got, _ = run(training, training.begin(method.init(KEY, params)[0], spread, KEY), range(2))
    assert not got.trainable["down/kernel"]["a"].sharding.is_fully_replicated
    assert_close(got.trainable, want.trainable, 1e-4)
    levels = [levels_of(training.advance(state, X)) for state in (got, want)]
    assert not np.array_equal(levels[0], before[0])
    assert_close(levels[0], levels[1], 1e-4)


# Layers, views, files, errors.


@pytest.mark.slow
@pytest.mark.parametrize("mode", quick_at(["released", "none"], 0))
def test_layers_that_are_not_trained_keep_their_base(mode):
    method = make(layers=[1], mode=mode)
    frozen, trainable = begun(method)
    change = jnp.abs(update(method, frozen, moved(trainable))).max((1, 2))
    assert change[0] == 0
    assert float(change[1]) > 1e-3


def test_a_slice_of_outputs_has_no_softmax_of_its_own():
    method = make(targets=["down"])
    frozen, trainable = begun(method)
    params = method.apply(frozen, moved(trainable))
    inputs = lambda p, x: x[:, :5] @ p["down"]["kernel"][:5]
    assert_close(pj.adapt(inputs)(params, X[:, :M]), inputs(method.merge(frozen, moved(trainable)), X[:, :M]))
    with pytest.raises(PeftError, match="down/kernel"):
        pj.adapt(lambda p, x: x @ p["down"]["kernel"][:, :5])(params, X[:, :M])


def test_a_saved_adapter_comes_back_with_its_levels(tmp_path):
    method = make()
    frozen, trainable = method.init(jax.random.key(3), PARAMS)
    frozen, trainable = with_levels(frozen, 0.8), moved(trainable)
    save_adapter(tmp_path, method, frozen, trainable, seed=3)
    loaded = load_adapter(tmp_path, PARAMS)
    assert_close((loaded.trainable, loaded.frozen.state), (trainable, frozen.state), 0)
    assert_close(loaded.method.merge(loaded.frozen, loaded.trainable), method.merge(frozen, trainable), 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, r"budget: sparsity must be in \[0, 1\), got 1.0"),
        ({"total_steps": 4}, "budget: 1 epochs of 5 steps leave no allocation between warm-ups of 0 and 1"),
        ({"mode": "soft"}, "snella: mode must be one of released, paper, hard, none, got 'soft'"),
        ({"rank": 0}, "snella: rank must be positive, got 0"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(PeftError, match=text):
        make(**options)


@pytest.mark.slow
def test_an_epoch_is_a_hundredth_of_the_steps_if_not_given():
    levels = []
    for every in (None, 3):
        training = training_of(pj.snella(total_steps=300, allocate_every=every, rank=4), optax.set_to_zero())
        levels.append(run(training, training.start(KEY, PARAMS), range(4))[1])
    assert_close(levels[0], levels[1], 0)
    assert [np.array_equal(seen, levels[0][0]) for seen in levels[0]] == [True] * 3 + [False]
