"""SNELLA's budget against its equations, in NumPy's float64, and the faults of the released allocator."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.io import checkpoint
from peftjax.methods._importance import Importance
from peftjax.methods.sparse._allocation import allocate, scores, water_fill
from peftjax.methods.sparse._budget import Budget
from peftjax.transform.transform import changing_state, with_changing_state

RANDOM = np.random.default_rng(0)
ROUNDING = 2.0**-24


def exact_fill(total, scores, caps):
    """The released scheme in float64: shares by score, the rest to those that are not full."""
    scores = np.asarray(scores, np.float64) / np.sum(scores)
    kept = np.minimum(caps, total * scores)
    for _ in scores:
        free = kept < caps
        if not free.any():
            break
        kept = np.where(
            free, np.minimum(caps, kept + (total - kept.sum()) * scores / scores[free].sum()), caps
        )
    return kept


# Sharing out.


@pytest.mark.parametrize("total", [0.05, 0.4, 0.9, 0.999])
def test_the_volume_is_shared_by_score_and_nobody_gets_more_than_it_has(total):
    caps = RANDOM.dirichlet(np.ones(40))
    given = RANDOM.exponential(size=40) ** 3
    kept = np.asarray(water_fill(jnp.float32(total), jnp.asarray(given, jnp.float32), jnp.asarray(caps)))
    assert (kept <= caps.astype(np.float32)).all()
    np.testing.assert_allclose(kept.sum(), total, rtol=1e-6)
    np.testing.assert_allclose(kept, exact_fill(total, given, caps), rtol=1e-4, atol=1e-7)


def test_everything_is_kept_where_the_volume_is_the_whole():
    caps = jnp.asarray(RANDOM.dirichlet(np.ones(9)), jnp.float32)
    np.testing.assert_allclose(water_fill(jnp.float32(1.0), jnp.arange(9.0), caps), caps, atol=1e-6)


def test_equal_scores_and_shapes_get_equal_levels():
    levels = allocate(
        jnp.float32(0.3), {"a": jnp.full(3, 7.0), "b": jnp.full((2, 2), 7.0)}, {"a": 96, "b": 96}
    )
    assert {path: level.shape for path, level in levels.items()} == {"a": (3,), "b": (2, 2)}
    for level in levels.values():
        np.testing.assert_allclose(level, 0.7, atol=ROUNDING)


def test_scores_that_are_all_zero_count_as_equal():
    levels = allocate(jnp.float32(0.25), {"a": jnp.zeros(4)}, {"a": 64})
    np.testing.assert_allclose(levels["a"], 0.75, atol=ROUNDING)


def test_what_full_matrices_cannot_take_goes_to_those_without_a_score():
    levels = allocate(jnp.float32(0.5), {"a": jnp.array([0.0, 5.0, 0.0, 0.0])}, {"a": 64})
    np.testing.assert_allclose(levels["a"], [2 / 3, 0.0, 2 / 3, 2 / 3], atol=1e-6)


@pytest.mark.slow
def test_volumes_beyond_the_integers_of_float32():
    sizes = {"attention": 4096 * 4096, "mlp": 4096 * 11008}
    given = {"attention": RANDOM.exponential(size=128) ** 2, "mlp": RANDOM.exponential(size=96) ** 2}
    levels = allocate(jnp.float32(0.45), jax.tree.map(jnp.float32, given), sizes)
    kept = np.concatenate([(1.0 - np.float64(levels[path])) * sizes[path] for path in given])
    caps = np.concatenate([np.full(len(given[path]), sizes[path]) for path in given])
    whole = caps.sum()
    assert whole > 2**32
    assert abs(kept.sum() - np.float32(0.45) * whole) < 2e-7 * whole
    np.testing.assert_allclose(
        kept / caps, exact_fill(0.45 * whole, np.concatenate([*given.values()]), caps) / caps, atol=2e-6
    )


def test_importances_whose_product_is_below_float32_still_rank():
    values = {"x": {"a": jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), "b": jnp.ones((2, 1, 1, 1))}}
    tiny = jax.tree.map(lambda value: 1e-30 * value, values)
    found = scores(tiny, tiny)["x"]
    np.testing.assert_allclose(found[1] / found[0], (9 + 1) / (1 + 1), rtol=1e-5)


# The schedule.


def test_the_schedule_is_cubic_from_the_start_to_the_target():
    budget = Budget(0.8, 0.1, total_steps=1000, allocate_every=50, init_warmup=2, final_warmup=3)
    kept = [float(budget.kept(epoch)) for epoch in range(budget.epochs)]
    assert budget.epochs == 20
    assert kept[0] == kept[2] == np.float32(0.9)
    assert kept[17] == kept[19] == np.float32(0.2)
    assert (np.diff(kept) <= 0).all()
    np.testing.assert_allclose(kept[5], 0.2 + 0.7 * (1 - 3 / 15) ** 3, rtol=1e-6)


def test_the_last_epoch_has_the_target_and_the_released_one_falls_short():
    ours, released = (Budget(0.8, 0.0, 100, 10, final_warmup=w) for w in (1, 0))
    np.testing.assert_allclose(ours.kept(9), 0.2, rtol=1e-6)
    np.testing.assert_allclose(released.kept(9), 0.2 + 0.8 * 0.1**3, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1"),
        ({"allocate_every": 0}, "allocate_every must be positive, got 0"),
        ({"allocate_every": 60}, "2 epochs of 60 steps leave no allocation between warm-ups of 1 and 1"),
    ],
)
def test_wrong_options_are_refused(change, text):
    with pytest.raises(PeftError, match=text):
        Budget(
            **{
                "sparsity": 0.5,
                "initial_sparsity": 0.1,
                "total_steps": 100,
                "allocate_every": 10,
                "init_warmup": 1,
                **change,
            }
        )


# Around an optimizer, and before the steps.

PARAMS = {
    "up": {"kernel": jnp.zeros((2, 4, 6))},
    "down": {"kernel": jnp.zeros((6, 4))},
    "head": {"bias": jnp.ones(3)},
}
BUDGET = {"sparsity": 0.6, "initial_sparsity": 0.25, "total_steps": 12, "allocate_every": 3}
METHOD = pj.chain(pj.snella(rank=4, targets=["up", "down"], **BUDGET), pj.unfreeze(["head"]))
FACTORS = [(path, factor) for path in ("down/kernel", "up/kernel") for factor in ("a", "b")]


def start():
    """The method with factors of any numbers."""
    frozen, trainable = METHOD.init(KEY, PARAMS)
    own = jax.tree.map(
        lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape), jnp.float32), trainable["snella"]
    )
    return frozen, {**trainable, "snella": own}


def gradients(trainable, step):
    random = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape) ** 3, jnp.float32), trainable)


def run(tx, frozen, trainable, state, steps):
    """What the steps end with, and what each of them began with and made."""

    @jax.jit
    def update(grads, state, trainable, frozen):
        updates, state = tx.update(grads, state, trainable, frozen=frozen)
        return optax.apply_updates(trainable, updates), state

    history = []
    for step in steps:
        frozen, trainable, state = METHOD.advance(None, frozen, trainable, state, step=step, key=KEY, tx=tx)
        before = state
        trainable, state = update(gradients(trainable, step), state, trainable, frozen)
        history.append((frozen, trainable, before))
    assert update._cache_size() == 1
    return frozen, trainable, state, history


def levels_of(frozen):
    own = frozen.state["snella"]
    return np.concatenate([np.asarray(own[path]["sparsity"]).reshape(-1) for path in sorted(own)])


@pytest.mark.slow
def test_the_budget_is_the_papers_sequence_of_operations():
    tx = METHOD.optimizer(optax.sgd(0.1))
    frozen, before = start()
    *_, state, history = run(tx, frozen, before, tx.init(before), range(12))
    averages = dict.fromkeys(FACTORS, 0.0)
    deviations, caps = dict(averages), np.array([24.0, 24.0, 24.0])
    means, expected = {}, levels_of(frozen)
    for step, (now, after, _) in enumerate(history):
        epoch, rest = divmod(step, 3)
        if rest == 0 and epoch > 0:
            kept = 0.4 + 0.35 * (1 - epoch / 3) ** 3
            by_path = [means[path, "a"] + means[path, "b"] for path in ("down/kernel", "up/kernel")]
            expected = 1.0 - exact_fill(kept * caps.sum(), np.concatenate(by_path), caps) / caps
        np.testing.assert_allclose(levels_of(now), expected, atol=1e-5)
        grads = gradients(before, step)["snella"]
        for path, factor in FACTORS:
            name, theta = (path, factor), np.float64(after["snella"][path][factor])
            i = np.abs(theta * np.float64(grads[path][factor]))
            averages[name] = 0.85 * averages[name] + 0.15 * i
            deviations[name] = 0.85 * deviations[name] + 0.15 * np.abs(i - averages[name])
            means[name] = (averages[name] * deviations[name]).mean((-3, -2, -1)).reshape(-1)
        before = after
    np.testing.assert_allclose((1.0 - levels_of(history[-1][0])).mean(), 0.4, rtol=1e-6)
    for (path, factor), wanted in deviations.items():
        found = state.after["snella"].deviation[path][factor]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_before_an_epoch_the_levels_are_exactly_the_allocation_and_else_they_stay():
    tx = METHOD.optimizer(optax.sgd(0.1))
    frozen, trainable = start()
    *_, history = run(tx, frozen, trainable, tx.init(trainable), range(12))
    levels = np.stack([levels_of(frozen) for frozen, *_ in history])
    assert levels.dtype == np.float32
    assert len(np.unique(levels, axis=0)) == 4  # the start and three allocations
    assert (np.diff(levels, axis=0) != 0).any(1).nonzero()[0].tolist() == [2, 5, 8]
    budget = Budget(**BUDGET)
    for epoch in (1, 2, 3):
        frozen, _, state = history[3 * epoch]
        found = scores(*state.after["snella"])
        wanted = allocate(budget.kept(jnp.asarray(epoch, jnp.int32)), found, dict.fromkeys(found, 24))
        for path, level in wanted.items():
            np.testing.assert_array_equal(frozen.state["snella"][path]["sparsity"], level)


def test_the_levels_are_no_part_of_what_an_optimizer_moves():
    frozen, trainable = start()
    assert all("sparsity" not in slots for slots in trainable["snella"].values())
    assert changing_state(METHOD, frozen.state) == {
        "snella": {path: {"sparsity": slots["sparsity"]} for path, slots in frozen.state["snella"].items()}
    }
    plain = optax.adamw(0.1, weight_decay=0.5)
    tx = METHOD.optimizer(plain)
    state = tx.init(trainable)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 0]
    assert len(moments) == 2 * sum(leaf.ndim > 0 for leaf in jax.tree.leaves(trainable))
    found, after, *_ = run(tx, frozen, trainable, state, range(2))
    np.testing.assert_array_equal(levels_of(found), levels_of(frozen))
    wanted, state = trainable, plain.init(trainable)
    for step in range(2):
        updates, state = plain.update(gradients(wanted, step), state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), after, wanted)


def test_only_what_fluctuates_scores():
    tx = METHOD.optimizer(optax.set_to_zero())
    _, trainable = start()
    update = jax.jit(tx.update)
    state, grads = tx.init(trainable), jax.tree.map(jnp.ones_like, trainable)
    for _ in range(150):
        _, state = update(grads, state, trainable)
    own, found = trainable["snella"]["up/kernel"], state.after["snella"]
    np.testing.assert_allclose(found.mean["up/kernel"]["a"], jnp.abs(own["a"]), rtol=1e-5)
    assert all(float(leaf.max()) < 1e-6 for leaf in jax.tree.leaves(found.deviation))


def test_a_gradient_that_is_not_a_number_counts_as_unimportant():
    tx = METHOD.optimizer(optax.set_to_zero())
    _, trainable = start()
    nothing = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), trainable)
    _, state = tx.update(nothing, tx.init(trainable), trainable)
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(state.after["snella"]))


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_bit_exactly(tmp_path):
    tx = METHOD.optimizer(optax.adam(0.01))
    frozen, trainable = start()
    half, half_trained, half_state, _ = run(tx, frozen, trainable, tx.init(trainable), range(5))

    def saved(frozen, trainable, state, step):
        moved = {"trainable": trainable, "state": changing_state(METHOD, frozen.state)}
        return checkpoint.RunState(moved, state, jax.random.key(step), step, {}, {})

    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoint.save(checkpoints, saved(half, half_trained, half_state, 5))
        like = saved(frozen, trainable, tx.init(trainable), 0)
        found = checkpoint.restore_latest(checkpoints, like)
    assert isinstance(found.opt_state.after["snella"], Importance)
    again = replace(frozen, state=with_changing_state(frozen.state, found.trainable["state"]))
    wanted = run(tx, half, half_trained, half_state, range(5, 12))[:3]
    got = run(tx, again, found.trainable["trainable"], found.opt_state, range(5, 12))[:3]
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert not np.array_equal(levels_of(got[0]), levels_of(half))


def test_the_parameters_must_be_given():
    tx = METHOD.optimizer(optax.sgd(0.1))
    _, trainable = start()
    with pytest.raises(PeftError, match="needs the parameters"):
        tx.update(trainable, tx.init(trainable))
