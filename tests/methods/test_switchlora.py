"""SwitchLoRA against the released algorithm, written again in NumPy, and against what it promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretraining
import pytest
from pretraining import (
    PARAMS,
    M,
    N,
    X,
    advanced,
    assert_same_end,
    forward,
    loss_of,
    merged,
    resting,
    resumed,
    sharded,
    slots_of,
)
from support import KEY, assert_close, assert_no_dense_gradient

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.methods.lowrank._switching import Schedule, number

UP, DOWN = "up/kernel", "blocks/down/weight"
R = 4


def make(**options):
    # Often enough for some to switch at every step: 4 / 3 vectors of a matrix at first.
    given = {"rank": R, "total_steps": 1000, "interval": 3.0, "freeze_steps": 1}
    return pj.switchlora(**{**given, **options})


def started(method, tx=None, params=PARAMS, **options):
    return pretraining.started(method, optax.sgd(0.1) if tx is None else tx, params, **options)


def count(state, path=UP):
    return np.asarray(state.frozen.state[path]["switched"])


# The start.


@pytest.mark.parametrize("init", ["switchlora", "lora"])
def test_the_model_starts_as_it_was_given(init):
    run, state = started(make(init=init))
    assert_close(merged(run, state), PARAMS, 1e-6)
    changed = float(jnp.abs(state.frozen.state[UP]["weight"] - PARAMS["up"]["kernel"]).max())
    assert (changed > 1e-2) == (init == "switchlora")
    assert bool(state.trainable[UP]["b"].any()) == (init == "switchlora")


def test_factors_are_trained_and_all_else_is_held_by_the_method():
    frozen, trainable = make().init(KEY, PARAMS)
    held = {"weight", "pool_a", "pool_b", "frozen_a", "frozen_b", "switched"}
    for path in (UP, DOWN):
        assert set(trainable[path]) == {"a", "b"}
        assert set(frozen.state[path]) == held
        counters = [frozen.state[path][name] for name in ("frozen_a", "frozen_b", "switched")]
        assert all(counter.dtype == jnp.int32 and not counter.any() for counter in counters)
        assert counters[-1].shape == {UP: (), DOWN: (2,)}[path]


@pytest.mark.slow
def test_vectors_have_the_released_sizes_and_their_product_that_of_a_usual_start():
    n, m, r = 600, 300, 64
    params = {"up": {"kernel": jnp.zeros((n, m))}}
    frozen, trainable = pj.switchlora(rank=r, total_steps=1).init(KEY, params)
    slots, gain = {**frozen.state[UP], **trainable[UP]}, 3**-0.5
    std_a, std_b = (m**0.5 * r / n**1.5) ** 0.25 * gain**0.5, (r / (m * n) ** 0.5) ** 0.25 * gain**0.5
    for name, std in (("a", std_a), ("pool_a", std_a), ("b", std_b), ("pool_b", std_b)):
        np.testing.assert_allclose(slots[name].std(), std, rtol=0.02)
        np.testing.assert_allclose(jnp.abs(slots[name]).max(), 3**0.5 * std, rtol=0.01)
    np.testing.assert_allclose(slots["weight"].std(), gain / n**0.5, rtol=0.02)
    assert slots["pool_a"].shape == (m - r, n)
    assert slots["pool_b"].shape == (m - r, m)


@pytest.mark.slow
def test_without_a_switch_it_is_lora_with_alpha_one():
    method = make(train_rest=False)
    frozen, trainable = method.init(KEY, PARAMS)
    frozen = replace(frozen, advanced=True)
    own = jax.grad(lambda t: loss_of(method.apply(frozen, t), X))(trainable)
    lora = pj.lora(rank=R, alpha=1.0)
    params = {
        "up": {"kernel": frozen.state[UP]["weight"]},
        "blocks": {"down": {"weight": frozen.state[DOWN]["weight"]}},
        "norm": PARAMS["norm"],
    }
    base, _ = lora.init(KEY, params)
    wanted = jax.grad(lambda t: loss_of(lora.apply(base, t), X))(trainable)
    assert_close(own, wanted, 1e-6)


def test_no_dense_gradient_is_formed():
    assert_no_dense_gradient(forward, PARAMS, make(), X)


# The switch.


def released(slots, scale, numbers, warm=1):
    """One matrix [in, out] switched by those numbers as the released code does, pools whole."""
    a, b, w = (np.asarray(slots[name], np.float64) for name in ("a", "b", "weight"))
    r, spare = len(a), len(slots["pool_a"])
    size = r + spare
    chosen_a = list(range(size - r, size))
    chosen_b = [chosen_a[i - r // 2] for i in range(r)]
    pools = []
    for pool, live, chosen in ((slots["pool_a"], a, chosen_a), (slots["pool_b"], b, chosen_b)):
        whole = np.zeros((size, live.shape[1]))
        whole[:spare] = pool
        whole[chosen] = live
        pools.append(whole)
    at_a, at_b, frozen_a, frozen_b = 0, r // 2, np.zeros(r), np.zeros(r)
    for k in numbers:
        frozen_a, frozen_b = np.maximum(frozen_a - 1, 0), np.maximum(frozen_b - 1, 0)
        rows_a, rows_b = [(at_a + j) % r for j in range(k)], [(at_b + j) % r for j in range(k)]
        at_a, at_b = (at_a + k) % r, (at_b + k) % r
        turns = ((rows_a, a, b, chosen_a, pools[0], frozen_b), (rows_b, b, a, chosen_b, pools[1], frozen_a))
        for rows, live, other, chosen, pool, frozen in turns:
            first = chosen[rows[0] - 1] + 1 if rows else 0
            for j, row in enumerate(rows):
                new = (first + j) % size
                change = scale * np.outer(live[row] - pool[new], other[row])
                w += change if live is a else change.T
                pool[chosen[row]], live[row] = live[row], pool[new]
                chosen[row], frozen[row] = new, warm
    return a, b, w, frozen_a, frozen_b


def test_many_switches_are_those_of_the_released_code():
    run, state = started(make(total_steps=300))
    first, numbers = jax.tree.map(np.asarray, slots_of(state, UP)), []
    for step in range(30):
        before = count(state)
        state = advanced(run, state, step)
        numbers.append(int(count(state) - before))
    assert set(numbers) >= {0, 1, 2}
    assert sum(numbers) > 2 * (M - R)  # every vector was out and in again
    wanted = released(first, 1 / R, numbers)
    for name, want in zip(("a", "b", "weight", "frozen_a", "frozen_b"), wanted):
        np.testing.assert_allclose(slots_of(state, UP)[name], want, atol=1e-5, err_msg=name)


def test_a_switch_changes_no_output_and_loses_no_vector():
    run, before = started(make())
    state = before
    for step in range(3):  # at most 6 exchanges; after 8 every vector would be back in its place
        state = advanced(run, state, step)
        assert_close(merged(run, state), PARAMS, 1e-5)
    assert (count(state, DOWN) > 0).all()
    for path, factor in ((UP, "a"), (UP, "b"), (DOWN, "a"), (DOWN, "b")):
        was, now = slots_of(before, path), slots_of(state, path)
        both = [
            np.sort(np.concatenate([slots[factor], slots[f"pool_{factor}"]], -2), axis=-2)
            for slots in (was, now)
        ]
        np.testing.assert_array_equal(*both)
        assert not np.array_equal(was[factor], now[factor])


def test_gradients_of_all_that_is_trained_are_those_before_the_switch():
    method = make()
    run, state = started(method)
    grad = jax.jit(jax.grad(lambda t, frozen: loss_of(method.apply(frozen, t), X)))
    before = grad(state.trainable, replace(state.frozen, advanced=True))
    switched = advanced(run, state, 0)
    after = grad(switched.trainable, switched.frozen)
    assert count(switched) > 0
    for path in (UP, DOWN):
        for name in "ab":
            live = np.asarray(switched.frozen.state[path][f"frozen_{name}"])[..., None] == 0
            assert_close(after[path][name] * live, before[path][name] * live)
            assert not live.all()


def at_first_only(**options):
    """A method that switches before step 0, and later so rarely that it never does here."""
    return make(**{"total_steps": 1, "decay": 1.0, "interval": 10.0, "rank": 7, "freeze_steps": 5, **options})


@pytest.mark.slow
@pytest.mark.parametrize("tx", [optax.adamw(0.01, weight_decay=0.5), pj.optim.row_adamw(0.01)])
def test_a_counterpart_stays_for_exactly_five_steps(tx):
    run, state = started(at_first_only(), tx)
    rest = resting(run)
    for _ in range(3):
        state, _ = rest.step(state, X)
    keys = (jax.random.key(seed) for seed in range(50))
    tries = (advanced(run, state, 0, key=key) for key in keys)
    state = next(found for found in tries if count(found) > 0)
    row = int(jnp.argmax(state.frozen.state[UP]["frozen_b"]))
    moments = state.opt_state.optimizer[0]
    assert not moments.mu[UP]["b"][row].any()
    assert not moments.nu[UP]["b"][row].any()
    assert moments.mu[UP]["a"][row].any()
    assert moments.mu[UP]["b"].any()
    if moments.count is not None and isinstance(moments.count, dict):
        assert (np.ravel(moments.count[UP]["b"]) == [0 if i == row else 3 for i in range(7)]).all()
    held, new = (jnp.copy(state.trainable[UP][name][row]) for name in "ba")
    for number_of in range(1, 8):
        state, _ = rest.step(state, X)
        state = advanced(run, state, 1000)
        assert np.array_equal(state.trainable[UP]["b"][row], held) == (number_of <= 5)
    assert not np.array_equal(state.trainable[UP]["a"][row], new)


def test_as_many_are_switched_as_expected_and_fewer_later():
    schedule = Schedule(40.0, 0.1, 40_000, 5)
    slots = {"a": jnp.zeros((128, 1)), "pool_a": jnp.zeros((256, 1)), "frozen_a": jnp.zeros(128)}
    draw = jax.jit(jax.vmap(lambda key, step: number(schedule, key, step, slots), (0, None)))
    for step, wanted in ((0, 3.2), (4_000, 0.96), (8_000, 0.288), (20_000, 0.0078)):
        found = np.asarray(draw(jax.random.split(KEY, 20_000), step))
        expected = 128 / 40 * 0.3 ** ((step + 1) / 4000)
        np.testing.assert_allclose(expected, wanted, rtol=0.01)
        assert set(found) <= {int(expected), int(expected) + 1}
        assert found.max() <= schedule.most(128)
        assert abs(found.mean() - expected) < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(("busy", "places", "wanted"), [(0, 9, 4), (3, 9, 1), (4, 9, 0), (0, 2, 2)])
def test_no_more_are_switched_than_may_be(busy, places, wanted):
    schedule = Schedule(1.0, 1e6, 1, 0)  # all of the 8, if it could
    slots = {
        "a": jnp.zeros((8, 1)),
        "pool_a": jnp.zeros((places, 1)),
        "frozen_a": jnp.arange(8.0) < busy,
    }
    assert int(number(schedule, KEY, jnp.asarray(0), slots)) == wanted


@pytest.mark.slow
def test_changes_grow_beyond_the_rank():
    run, state = started(make(train_rest=False, rank=2, freeze_steps=0, interval=1.0), optax.adam(0.05))
    for _ in range(20):
        state, _ = run.step(state, X)
    change = np.asarray(merged(run, state)["up"]["kernel"] - PARAMS["up"]["kernel"])
    sizes = np.linalg.svd(change, compute_uv=False)
    assert (sizes > 1e-3 * sizes[0]).sum() > 4


# With optimizers, chains, devices and runs.


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [optax.lion(1e-3), optax.sgd(0.1, momentum=0.9), optax.adafactor(1e-3, min_dim_size_to_factor=2)],
    ids=["lion", "sgd", "adafactor"],
)
def test_rows_of_other_optimizers_are_reset(tx):
    run, state = started(make(), tx)
    state, _ = resting(run).step(state, X)
    after = advanced(run, state, 0)
    rows = np.asarray(after.frozen.state[UP]["frozen_b"]) > 0
    assert rows.any()
    state, after = state.opt_state, after.opt_state
    seen = 0
    for (path, was), now in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after)):
        if [getattr(key, "key", None) for key in path[-2:]] == [UP, "b"] and was.shape[:1] == (R,):
            seen += 1
            assert was.reshape(R, -1).any(1).all()
            np.testing.assert_array_equal(now.reshape(R, -1).any(1), ~rows)
    assert seen == 1


def test_moments_without_rows_of_numbers_are_refused():
    codes = {UP: {"b": jnp.zeros((R, M), jnp.uint8)}}
    run, state = started(make())
    with pytest.raises(PeftError, match=r"switchlora: the optimizer keeps .* as uint8"):
        advanced(run, state, 0, opt_state=codes)


def test_in_a_chain_the_other_method_is_trained_and_left_alone():
    method = pj.chain(make(targets=["up"], train_rest=False), pj.unfreeze(["norm"]))
    run, state = started(method, optax.adam(0.01))
    rest = resting(run)
    state, _ = rest.step(state, X)
    new = advanced(run, state, 0)
    rows = np.asarray(new.frozen.state["switchlora"][UP]["frozen_b"]) > 0
    assert rows.any()
    moments = new.opt_state.optimizer[0].mu
    np.testing.assert_array_equal(moments["switchlora"][UP]["b"].any(1), ~rows)
    assert moments["unfreeze"]["norm/scale"].any()
    assert_close(merged(run, new), merged(run, state))
    before = jax.tree.map(jnp.copy, new.trainable)
    moved = rest.step(new, X)[0].trainable
    kept = np.asarray((moved["switchlora"][UP]["b"] == before["switchlora"][UP]["b"]).all(1))
    np.testing.assert_array_equal(kept, rows)
    assert (moved["unfreeze"]["norm/scale"] != before["unfreeze"]["norm/scale"]).all()


@pytest.mark.slow
def test_sharded_over_eight_devices_it_is_that_of_one():
    found = []
    for place in (lambda slots: slots, sharded):
        run, state = started(make(), optax.adam(0.01), place=place)
        for _ in range(4):
            state, _ = run.step(state, X)
        found.append(state)
    assert count(found[0]) > 0
    assert not found[1].frozen.state[UP]["weight"].sharding.is_fully_replicated
    assert not found[1].trainable[UP]["a"].sharding.is_fully_replicated
    for got, want in zip(*((state.frozen.state, state.trainable) for state in found[::-1])):
        assert_close(got, want, 1e-4)


@pytest.mark.slow
def test_a_run_goes_on_bit_exactly(tmp_path):
    method = make(targets=["layer"])
    continued, whole = resumed(method, tmp_path)
    assert_same_end(continued, whole)
    assert count(whole, "layer/kernel") > 5


def in_float32(run, state):
    held = jax.tree.map(lambda x: x.astype(jnp.float32), state.frozen.state)
    return run.method.merge(replace(state.frozen, state=held), state.trainable)["up"]["kernel"]


def test_a_bfloat16_weight_is_rounded_by_every_switch():
    drift = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        run, state = started(make(), params={"up": {"kernel": PARAMS["up"]["kernel"].astype(dtype)}})
        first = in_float32(run, state)
        for step in range(20):
            state = advanced(run, state, step)
        assert state.frozen.state[UP]["weight"].dtype == dtype
        last = in_float32(run, state)
        drift[dtype] = float(jnp.linalg.norm(last - first) / jnp.linalg.norm(first))
    assert drift[jnp.float32] < 1e-6
    assert 1e-3 < drift[jnp.bfloat16] < 3e-2


# Errors.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"total_steps": 0}, "switchlora: total_steps must be positive, got 0"),
        ({"decay": 0.0}, "switchlora: decay must be positive, got 0.0"),
        ({"freeze_steps": -1}, "switchlora: freeze_steps must be 0 or more, got -1"),
        ({"freeze_steps": 2}, "switchlora: interval must be at least 4, twice freeze_steps, got 3.0"),
        ({"init": "zero"}, "switchlora: init must be one of switchlora, lora, got 'zero'"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(PeftError, match=text):
        make(**options)


@pytest.mark.parametrize("rank", [1, M])
def test_a_rank_that_leaves_nothing_to_switch_is_refused(rank):
    with pytest.raises(PeftError, match=rf"switchlora: rank {rank} of 'up/kernel', {N} x {M}, leaves no"):
        make(rank=rank).init(KEY, {"up": PARAMS["up"]})


def test_a_base_that_is_no_array_is_refused():
    method = pj.chain(pj.lora(rank=2), make())
    with pytest.raises(PeftError, match=r"switchlora: '.*' is a LowRank"):
        method.init(KEY, PARAMS)


def test_the_update_needs_what_the_method_holds():
    run, state = started(make())
    gradients = state.trainable
    needs = r"switchlora: the update needs what the method holds fixed; call tx.update\(.* frozen=frozen\)"
    with pytest.raises(PeftError, match=needs):
        run.tx.update(gradients, state.opt_state)
    with pytest.raises(PeftError, match=needs):
        run.tx.update(gradients, state.opt_state, state.trainable)
    run.tx.update(gradients, state.opt_state, state.trainable, frozen=state.frozen)
