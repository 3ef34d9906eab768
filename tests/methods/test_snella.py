"""SNELLA's map and its training with a budget; the budget's arithmetic is in tests/optim/test_budget.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close
from tiny_models import moved

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core.errors import PeftError
from peftjax.io import checkpoint

L, N, M = 2, 12, 8
STACK = jax.random.normal(KEY, (L, N, M))
PARAMS = {
    "blocks": {"up": {"kernel": STACK}},
    "down": {"kernel": STACK[0].T},
    "head": {"kernel": jnp.ones((N, 3))},
}
X = jax.random.normal(jax.random.key(1), (5, N))


def forward(params, x):
    def block(h, w):
        return h + jnp.tanh(x @ w), None

    h, _ = jax.lax.scan(block, jnp.zeros((len(x), M)), params["blocks"]["up"]["kernel"])
    return h @ params["down"]["kernel"] @ params["head"]["kernel"]


def make(**options):
    given = {"total_steps": 20, "allocate_every": 5, "rank": 4, "coefficient": 1.0, "sparsity": 0.6}
    return pj.snella(**{**given, **options})


def trainer(method, frozen, tx):
    def loss(trainable, x):
        return jnp.sum(jnp.sin(pj.adapt(forward)(method.apply(frozen, trainable), x)))

    @jax.jit
    def step(trainable, state, x):
        updates, state = tx.update(jax.grad(loss)(trainable, x), state, trainable)
        return optax.apply_updates(trainable, updates), state

    return step


def run(step, trainable, state, steps):
    seen = []
    for n in steps:
        trainable, state = step(trainable, state, X * (1 + n % 3))
        seen.append(trainable)
    return trainable, state, seen


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


# The map.


@pytest.mark.slow
def test_without_its_second_term_it_is_snell():
    method, snell = make(initial_sparsity=0.3), pj.snell(rank=4, sparsity=0.3, coefficient=1.0)
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = with_slots(moved(trainable), alpha=0.0, beta=0.0, sparsity=0.3)
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
    _, trainable = make().init(KEY, PARAMS)
    slots = trainable["blocks/up/kernel"]
    for name, value in {"alpha": 1.0, "gamma": 1.0, "beta": 0.0}.items():
        np.testing.assert_array_equal(slots[name], np.full(L, value))
    np.testing.assert_allclose(slots["sparsity"], 0.01, atol=2.0**-25)


# Training.


@pytest.mark.slow
def test_the_budget_is_met_at_every_allocation_and_nothing_is_compiled_again():
    method = make(initial_sparsity=0.1)
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.adam(0.01))
    step = trainer(method, frozen, tx)
    after, _, seen = run(step, trainable, tx.init(trainable), range(20))
    assert step._cache_size() == 1
    kept = [np.concatenate([(1 - s["sparsity"]).reshape(-1) for s in t.values()]).mean() for t in seen]
    wanted = [0.4 + 0.5 * (1 - epoch / 3) ** 3 for epoch in range(4)]
    np.testing.assert_allclose(kept[:4] + kept[4::5], [wanted[0]] * 4 + [*wanted[1:], wanted[3]], rtol=1e-5)
    levels = np.concatenate([slots["sparsity"].reshape(-1) for slots in after.values()])
    assert np.ptp(levels) > 0.01
    zeros = (update(method, frozen, after) == 0).sum((1, 2))
    np.testing.assert_allclose(zeros, after["blocks/up/kernel"]["sparsity"] * N * M, atol=1.01)


@pytest.mark.slow
def test_in_a_chain_the_rest_is_trained_as_without_it():
    method = pj.chain(make(), pj.unfreeze(["head"]))
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.adamw(0.01, weight_decay=0.1))
    step = trainer(method, frozen, tx)
    after, state, _ = run(step, trainable, tx.init(trainable), range(4))
    np.testing.assert_array_equal(
        after["snella"]["down/kernel"]["sparsity"], trainable["snella"]["down/kernel"]["sparsity"]
    )
    assert int(state.step) == 4
    assert float(jnp.abs(after["unfreeze"]["head/kernel"] - 1.0).min()) > 1e-3
    after, _, _ = run(step, after, state, range(4, 5))
    assert float(after["snella"]["down/kernel"]["sparsity"]) > 0.02


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_bit_exactly(tmp_path):
    method = make()
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.adam(0.01))
    step = trainer(method, frozen, tx)
    half, state, _ = run(step, trainable, tx.init(trainable), range(7))
    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoint.save(checkpoints, checkpoint.RunState(half, state, KEY, 7, {}, {}))
        like = checkpoint.RunState(trainable, tx.init(trainable), KEY, 0, {}, {})
        found = checkpoint.restore_latest(checkpoints, like)
    got = run(step, found.trainable, found.opt_state, range(7, 16))[:2]
    jax.tree.map(np.testing.assert_array_equal, got, run(step, half, state, range(7, 16))[:2])


def test_without_a_sparsifier_there_is_no_level_and_no_hook():
    method = make(mode="none")
    frozen, trainable = method.init(KEY, PARAMS)
    assert set(trainable["down/kernel"]) == {"a", "b", "alpha", "gamma", "beta"}
    tx = optax.sgd(0.1)
    assert method.optimizer(tx) is tx
    assert method.apply(frozen, trainable)["down"]["kernel"].threshold is None


@pytest.mark.slow
def test_factors_and_scores_sharded_over_eight_devices_give_the_levels_of_one():
    method = make(rank=8, allocate_every=2)
    frozen, trainable = method.init(KEY, PARAMS)
    tx = method.optimizer(optax.sgd(0.01))
    want, *_ = run(trainer(method, frozen, tx), trainable, tx.init(trainable), range(2))
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
    got, *_ = run(trainer(method, method.init(KEY, params)[0], tx), spread, tx.init(spread), range(2))
    assert float(got["down/kernel"]["sparsity"]) != float(trainable["down/kernel"]["sparsity"])
    assert_close(got, want, 1e-4)


# Layers, views, files, errors.


@pytest.mark.parametrize("mode", ["released", "none"])
def test_layers_that_are_not_trained_keep_their_base(mode):
    method = make(layers=[1], mode=mode)
    frozen, trainable = method.init(KEY, PARAMS)
    change = jnp.abs(update(method, frozen, moved(trainable))).max((1, 2))
    assert change[0] == 0
    assert float(change[1]) > 1e-3


def test_a_slice_of_outputs_has_no_softmax_of_its_own():
    method = make(targets=["down"])
    frozen, trainable = method.init(KEY, PARAMS)
    params = method.apply(frozen, moved(trainable))
    inputs = lambda p, x: x[:, :5] @ p["down"]["kernel"][:5]
    assert_close(pj.adapt(inputs)(params, X[:, :M]), inputs(method.merge(frozen, moved(trainable)), X[:, :M]))
    with pytest.raises(PeftError, match="down/kernel"):
        pj.adapt(lambda p, x: x @ p["down"]["kernel"][:, :5])(params, X[:, :M])


def test_a_saved_adapter_comes_back_with_its_levels(tmp_path):
    method = make()
    frozen, trainable = method.init(jax.random.key(3), PARAMS)
    trainable = with_slots(moved(trainable), sparsity=0.8)
    save_adapter(tmp_path, method, frozen, trainable, seed=3)
    loaded = load_adapter(tmp_path, PARAMS)
    assert_close(loaded.trainable, trainable, 0)
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
    states = []
    for every in (None, 3):
        method = pj.snella(total_steps=300, allocate_every=every, rank=4)
        _, trainable = method.init(KEY, PARAMS)
        tx = method.optimizer(optax.set_to_zero())
        state = tx.init(trainable)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, trainable), state, trainable)
        states.append(updates)
    assert_close(states[0], states[1], 0)
    assert float(jnp.abs(states[0]["down/kernel"]["sparsity"])) > 0
