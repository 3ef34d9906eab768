"""SNELLA's budget against its equations, in NumPy's float64, and the faults of the released allocator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftjax.core.errors import PeftError
from peftjax.io import checkpoint
from peftjax.methods.sparse._allocation import allocate, on_grid, scores, water_fill
from peftjax.methods.sparse._budget import Budget, BudgetState, share_budget

RANDOM = np.random.default_rng(0)
GRID = 2.0**-24


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
        np.testing.assert_allclose(level, 0.7, atol=GRID)


def test_scores_that_are_all_zero_count_as_equal():
    levels = allocate(jnp.float32(0.25), {"a": jnp.zeros(4)}, {"a": 64})
    np.testing.assert_allclose(levels["a"], 0.75, atol=GRID)


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


# The hook.

BUDGET = Budget(0.6, 0.25, total_steps=12, allocate_every=3)
SHAPES = {"up": ((2,), 4, 6), "down": ((), 6, 4)}
PREFIX = ("snella",)


def start():
    slots = {}
    for path, (stack, n, m) in SHAPES.items():
        factor = lambda size, stack=stack: jnp.asarray(RANDOM.normal(size=(*stack, 2, 3, size)), jnp.float32)
        slots[path] = {"a": factor(n), "b": factor(m), "sparsity": jnp.full(stack, on_grid(0.25))}
    return {"snella": slots, "head": jnp.ones(3)}


def gradients(params, step):
    random = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape) ** 3, jnp.float32), params) | {
        "head": jnp.ones(3)
    }


def without_level(grads):
    """The gradient of a level is zero."""
    own = {path: {**slots, "sparsity": 0.0 * slots["sparsity"]} for path, slots in grads["snella"].items()}
    return {**grads, "snella": own}


def run(tx, params, state, steps):
    step_fn = jax.jit(lambda grads, state, params: tx.update(grads, state, params))
    history = []
    for step in steps:
        updates, state = step_fn(without_level(gradients(params, step)), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    assert step_fn._cache_size() == 1
    return params, state, history


def levels_of(params):
    own = params["snella"]
    return np.concatenate([np.asarray(own[path]["sparsity"]).reshape(-1) for path in ("down", "up")])


@pytest.mark.slow
def test_the_hook_is_the_papers_sequence_of_operations():
    tx = share_budget(optax.sgd(0.1), BUDGET, PREFIX)
    params = start()
    _, state, history = run(tx, params, tx.init(params), range(12))
    averages = dict.fromkeys(("down a", "down b", "up a", "up b"), 0.0)
    deviations, caps = dict(averages), np.array([24.0, 24.0, 24.0])
    before, expected = params, levels_of(params)
    for step, after in enumerate(history):
        grads, means = gradients(before, step), {}
        for name in averages:
            path, factor = name.split()
            i = np.abs(np.float64(after["snella"][path][factor]) * np.float64(grads["snella"][path][factor]))
            averages[name] = 0.85 * averages[name] + 0.15 * i
            deviations[name] = 0.85 * deviations[name] + 0.15 * np.abs(i - averages[name])
            means[name] = (averages[name] * deviations[name]).mean((-3, -2, -1)).reshape(-1)
        epoch, rest = divmod(step + 1, 3)
        if rest == 0 and epoch < 4:
            kept = 0.4 + 0.35 * (1 - epoch / 3) ** 3
            score = np.concatenate([means["down a"] + means["down b"], means["up a"] + means["up b"]])
            expected = 1.0 - exact_fill(kept * caps.sum(), score, caps) / caps
        np.testing.assert_allclose(levels_of(after), expected, atol=1e-5)
        before = after
    np.testing.assert_allclose((1.0 - levels_of(after)).mean(), 0.4, rtol=1e-6)
    for name, wanted in deviations.items():
        path, factor = name.split()
        np.testing.assert_allclose(state.deviation[path][factor], wanted, rtol=1e-4, atol=1e-5)


def test_a_step_lands_on_the_new_level_exactly():
    tx = share_budget(optax.sgd(0.1), BUDGET, PREFIX)
    params = start()
    *_, history = run(tx, params, tx.init(params), range(12))
    levels = np.stack([levels_of(params) for params in history])
    assert len(np.unique(levels, axis=0)) == 4  # the start and three allocations
    assert (np.diff(levels, axis=0) != 0).any(1).nonzero()[0].tolist() == [1, 4, 7]
    np.testing.assert_array_equal(levels * 2.0**24, np.round(levels * 2.0**24))
    old, new = on_grid(0.8), on_grid(1e-5)  # without the grid, 0.8 + (1e-5 - 0.8) misses by 2e-8
    assert float(optax.apply_updates(old, new - old)) == float(new)


def test_the_optimizer_inside_never_sees_a_level():
    params = start()
    tx = share_budget(optax.adamw(0.1, weight_decay=0.5), BUDGET, PREFIX)
    state = tx.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.ndim > 0]
    assert len(moments) == 2 * (len(jax.tree.leaves(params)) - len(SHAPES))
    after, _, _ = run(tx, params, state, range(2))
    np.testing.assert_array_equal(levels_of(after), levels_of(params))
    plain = optax.adamw(0.1, weight_decay=0.5)
    wanted, state = params, plain.init(params)
    for step in range(2):
        updates, state = plain.update(without_level(gradients(wanted, step)), state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    for path, slots in wanted["snella"].items():
        for factor in ("a", "b"):
            np.testing.assert_allclose(after["snella"][path][factor], slots[factor], rtol=1e-6, atol=1e-7)


def test_only_what_fluctuates_scores():
    tx = share_budget(optax.set_to_zero(), BUDGET, PREFIX)
    params = start()
    update = jax.jit(tx.update)
    state, grads = tx.init(params), without_level(jax.tree.map(jnp.ones_like, params))
    for _ in range(150):
        _, state = update(grads, state, params)
    own = params["snella"]["up"]
    np.testing.assert_allclose(state.importance["up"]["a"], jnp.abs(own["a"]), rtol=1e-5)
    assert all(float(leaf.max()) < 1e-6 for leaf in jax.tree.leaves(state.deviation))


def test_a_gradient_that_is_not_a_number_counts_as_unimportant():
    tx = share_budget(optax.set_to_zero(), BUDGET, PREFIX)
    params = start()
    _, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params), tx.init(params), params)
    assert all(
        float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves((state.importance, state.deviation))
    )


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_bit_exactly(tmp_path):
    tx = share_budget(optax.adam(0.01), BUDGET, PREFIX)
    params = start()
    half, half_state, _ = run(tx, params, tx.init(params), range(5))
    saved = checkpoint.RunState(half, half_state, jax.random.key(0), 5, {}, {})
    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoint.save(checkpoints, saved)
        like = checkpoint.RunState(params, tx.init(params), jax.random.key(1), 0, {}, {})
        found = checkpoint.restore_latest(checkpoints, like)
    assert isinstance(found.opt_state, BudgetState)
    wanted, again = (run(tx, now.trainable, now.opt_state, range(5, 12))[:2] for now in (saved, found))
    jax.tree.map(np.testing.assert_array_equal, wanted, again)
    assert int(again[1].step) == 12


def test_the_parameters_must_be_given():
    tx = share_budget(optax.sgd(0.1), BUDGET, PREFIX)
    params = start()
    with pytest.raises(PeftError, match="needs the parameters"):
        tx.update(params, tx.init(params))
