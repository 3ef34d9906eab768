"""FlexRound and LRQ: rounding that is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import KEY, noisy, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.quantize.codes import decode
from peftjax.testing.comparisons import assert_close
from peftjax.weights.rounded import Rounded, with_codes

PARAMS = {
    "up": {"kernel": jax.random.normal(KEY, (16, 12)).at[3].set(0.0)},
    "down": {"kernel": jax.random.normal(KEY, (12, 8))},
}
X = jax.random.normal(KEY, (5, 16))
OPTIONS = [
    {"format": "int4", "group": 8, "affine": True},
    {"format": "int3", "group": -1, "rank": 2},
    {"format": "int2", "group": 4, "search": 5},
    {"format": "int8", "scales": "bfloat16"},
]


def model(params, x):
    return jnp.tanh(0.3 * x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params, x):
    return jnp.sum(jnp.sin(model(params, x)))


def numbers_of(slots, shape):
    """The logarithm that divides each number, in NumPy, for slots that are within bounds."""
    log = slots["log"] if "log" in slots else np.einsum("rn,rm->nm", slots["right"], slots["left"])
    log = np.asarray(log, np.float64) + np.asarray(slots["log_output"])
    if "log" not in slots:
        log = log + np.asarray(slots["by_output"]) + np.asarray(slots["by_input"])[:, None]
    assert log.shape == shape
    return log


def straight_through(w, slots, start, group, low, high):
    """By the paper's equations in float64: Ŵ, W', which of them are within, and each number's group."""
    step = np.asarray(start["step"], np.float64) * np.exp(np.asarray(slots["log_step"], np.float64))
    zero = np.asarray(start.get("zeros", np.zeros_like(step)), np.float64)
    groups = np.arange(w.shape[0]) // group
    s1, z = step[:, groups].T, zero[:, groups].T
    moved = np.asarray(w, np.float64) * np.exp(-numbers_of(slots, w.shape))
    code = np.round(moved / s1) + z
    within = (code >= low) & (code <= high)
    return s1 * (np.clip(code, low, high) - z), moved, within, groups


@pytest.mark.parametrize("options", quick_at(OPTIONS, 0))
def test_it_starts_as_rounding_to_the_nearest_and_trains_by_the_equations_of_the_paper(options):
    method = pj.flexround(**options)
    frozen, fresh = method.init(KEY, PARAMS)
    plain = pj.quantized(**{name: value for name, value in options.items() if name != "rank"})
    nearest = plain.init(KEY, PARAMS)[0].params

    @jax.jit
    def found(trained, frozen, x):
        applied = method.apply(frozen, trained)
        value, gradient = jax.value_and_grad(lambda t: pj.adapt(loss)(method.apply(frozen, t), x))(trained)
        weights = jax.tree.map(lambda w: w.dense(), applied, is_leaf=lambda w: isinstance(w, Rounded))
        return with_codes(applied), weights, value, gradient

    codes = found(fresh, frozen, X)[0]
    for module in PARAMS:
        got, want = (part[module]["kernel"].codes for part in (codes, nearest))
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(decode(got.scales), decode(want.scales))

    trained = noisy(fresh, scale=0.05)
    codes, weights, value, gradients = found(trained, frozen, X)
    wanted, dense = jax.value_and_grad(loss)(weights, X)
    assert_close(value, wanted)
    bits = int(options["format"][3:])
    greatest = 2 ** (bits - 1) - 1
    low, high = (0, 2**bits - 1) if options.get("affine") else (-greatest, greatest)
    for module, path in (("up", "up/kernel"), ("down", "down/kernel")):
        coded, weight = codes[module]["kernel"], weights[module]["kernel"]
        np.testing.assert_array_equal(coded.dense(), weight)
        np.testing.assert_array_equal(coded.codes.units, np.round(coded.codes.units))
        slots, got, w = trained[path], gradients[path], PARAMS[module]["kernel"]
        if "scales" in options:
            continue  # which every pass rounds: another step
        group = w.shape[0] if options["group"] == -1 else options["group"]
        rounded, moved, within, groups = straight_through(w, slots, frozen.state[path], group, low, high)
        assert_close(weight, rounded.astype(np.float32))
        g = np.asarray(dense[module]["kernel"], np.float64)
        of_log = -g * moved * within
        of_step = np.zeros((len(set(groups)), w.shape[1]))
        np.add.at(of_step, groups, g * (rounded - moved * within))
        assert_close(got["log_step"], of_step.T, 1e-4)
        assert_close(got["log_output"], of_log.sum(0), 1e-4)
        if "log" in slots:
            assert_close(got["log"], of_log, 1e-4)
            assert module == "down" or not np.any(got["log"][3])
            continue
        assert_close(got["left"], np.asarray(slots["right"]) @ of_log, 1e-4)
        assert_close(got["right"], np.asarray(slots["left"]) @ of_log.T, 1e-4)
        assert_close(got["by_output"], of_log.sum(0), 1e-4)
        assert_close(got["by_input"], of_log.sum(1), 1e-4)


@pytest.mark.slow
def test_bounds_and_what_is_cut_off_have_no_gradient_and_two_factors_can_undo_each_other():
    method = pj.flexround(format="int2", group=-1, search=20, targets="w")
    w = jnp.linspace(-1.0, 1.0, 64).reshape(64, 1).at[0].set(1.6)
    frozen, trainable = method.init(KEY, {"w": w})
    at = trainable["w"]
    x = jnp.ones((1, 64))

    @jax.jit
    def gradient(slots):
        return jax.grad(lambda t: jnp.sum(pj.adapt(lambda p: x @ p["w"])(method.apply(frozen, {"w": t}))))(
            slots
        )

    step = float(frozen.state["w"]["step"][0, 0])
    cut_off = np.abs(w) > 1.5 * step
    assert 0 < cut_off.sum() < 32
    got = np.asarray(gradient(at)["log"])
    np.testing.assert_array_equal(got[cut_off], 0)
    assert_close(got[~cut_off], -np.asarray(w)[~cut_off])
    beyond = {**at, "log": at["log"].at[5].set(1.5), "log_step": at["log_step"] + 1.5}
    got = gradient(beyond)
    assert float(got["log"][5, 0]) == 0
    assert not np.any(got["log_step"])
    edge = {**beyond, "log": beyond["log"].at[5].set(np.log(4)), "log_step": at["log_step"] + np.log(4)}
    merged = jax.jit(lambda slots: method.merge(frozen, {"w": slots})["w"])
    np.testing.assert_array_equal(merged(beyond), merged(edge))
    shifted = {**at, "log": at["log"] - 0.25, "log_output": at["log_output"] + 0.25}
    np.testing.assert_array_equal(merged(at), merged(shifted))


@pytest.mark.slow
def test_layers_of_a_stack_round_each_for_itself_and_training_lowers_the_error():
    w = {"layers": {"kernel": 0.4 * jax.random.normal(KEY, (3, 16, 16))}}

    def stack(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]

    target = stack(w, X)
    for options in ({}, {"rank": 4}):
        method = pj.flexround(format="int3", group=-1, **options)
        frozen, trainable = method.init(KEY, w)
        tx = optax.adam(1e-2)

        @jax.jit
        def step(trainable, state, frozen=frozen, method=method, tx=tx):
            def error(t):
                return jnp.mean((pj.adapt(stack)(method.apply(frozen, t), X) - target) ** 2)

            value, gradient = jax.value_and_grad(error)(trainable)
            updates, state = tx.update(gradient, state)
            return optax.apply_updates(trainable, updates), state, value

        state, errors = tx.init(trainable), []
        for _ in range(60):
            trainable, state, value = step(trainable, state)
            errors.append(float(value))
        assert min(errors[-5:]) < 0.6 * errors[0], errors
        whole = method.merge(frozen, trainable)["layers"]["kernel"]
        for layer in range(3):
            one, _ = method.init(KEY, {"layers": {"kernel": w["layers"]["kernel"][layer][None]}})
            own = jax.tree.map(lambda part, layer=layer: part[layer][None], trainable)
            np.testing.assert_array_equal(method.merge(one, own)["layers"]["kernel"][0], whole[layer])


def test_it_refuses_what_it_cannot_round():
    for wrong in ({"format": "nf4"}, {"scales": "double"}, {"rank": 0}):
        with pytest.raises(PeftError, match=f"flexround: {next(iter(wrong))} must be"):
            pj.flexround(**wrong)
    with pytest.raises(PeftError, match="rounded already"):
        pj.chain(pj.quantized(format="int4"), pj.flexround(format="int4")).init(KEY, PARAMS)


@pytest.mark.slow
def test_bfloat16_weights_start_from_the_codes_that_rounding_makes_of_them():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    method, plain = pj.flexround(format="int4", group=4), pj.quantized(format="int4", group=4)
    got, want = (m.merge(*m.init(KEY, params)) for m in (method, plain))
    for module in PARAMS:
        assert got[module]["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[module]["kernel"], want[module]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_divided_base_is_rounded_as_on_one_device(kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    w = 0.1 * jax.random.normal(KEY, (2, 16, 16))
    x = jax.random.normal(KEY, (8, 16))

    def stack(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]

    for options in ({"group": -1}, {"group": 4, "affine": True}, {"group": -1, "rank": 2}):
        method = pj.flexround(format="int4", **options)

        @jax.jit
        def step(frozen, trainable, x, method=method):
            return jax.value_and_grad(lambda t: jnp.sum(pj.adapt(stack)(method.apply(frozen, t), x) ** 2))(
                trainable
            )

        frozen, fresh = method.init(KEY, {"layers": {"kernel": w}})
        trained = noisy(fresh)
        want = step(frozen, trained, x)
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
            frozen, fresh = method.init(KEY, {"layers": {"kernel": jax.device_put(w, sharding)}})
            placed = jax.tree.map(lambda own, like: jax.device_put(own, like.sharding), trained, fresh)
            got = step(frozen, placed, jax.device_put(x, NamedSharding(mesh, PartitionSpec())))
        if "log" in fresh["layers/kernel"]:
            assert fresh["layers/kernel"]["log"].sharding.spec[1] == "tensor"
        assert_close(jax.tree.map(np.asarray, got), want, 1e-4)
