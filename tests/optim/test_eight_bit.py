import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import KEY, all_but_slow, assert_close

import peftjax as pj
from peftjax.io import checkpoint
from peftjax.optim.elementwise import is_elementwise
from peftjax.quantize import Codes, decode

eight_bit = pj.optim.eight_bit


def params_of(dtype=jnp.float32):
    keys = jax.random.split(KEY, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
    return {
        "blocks": {"up": normal(keys[0], 4, 32, 64), "down": normal(keys[1], 4, 64, 32)},
        "head": normal(keys[2], 192, 128),
        "bias": normal(keys[3], 128),
    }


def gradients(params, n):
    """Like those of a step: of different sizes by row, and nearly the same every time."""

    def of(p):
        rows = 10.0 ** jnp.linspace(-2, 0, p.shape[0]).reshape(-1, *[1] * (p.ndim - 1))
        noise = jax.random.normal(jax.random.fold_in(KEY, n), p.shape)
        return (rows * (jnp.sign(p) + 0.3 * noise)).astype(p.dtype)

    return jax.tree.map(of, params)


def run(tx, params, steps=6, state=None, first=0):
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for n in range(first, first + steps):
        params, state = step(params, state, gradients(params, n))
    return params, state


def coded(state):
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: isinstance(node, Codes))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Codes)}


def moved(new, old):
    return np.concatenate([np.ravel(a - b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old))])


OPTIMIZERS = {
    "adam": (optax.adam(1e-2), {"mu": True, "nu": False}),
    "adamw": (optax.adamw(1e-2, weight_decay=0.1), {"mu": True, "nu": False}),
    "amsgrad": (optax.amsgrad(1e-2), {"mu": True, "nu": False, "nu_max": False}),
    "adamax": (optax.adamax(1e-2), {"mu": True, "nu": False}),
    "lion": (optax.lion(1e-2), {"mu": True}),
    "sgd": (optax.sgd(1e-2, momentum=0.9), {"trace": True}),
    "adagrad": (optax.adagrad(1e-2), {"sum_of_squares": False}),
    "rmsprop": (optax.rmsprop(1e-2), {"nu": False}),
    "adan": (optax.adan(1e-2), {"m": True, "v": True, "n": False}),
    "adafactor": (optax.adafactor(1e-2, momentum=0.9, min_dim_size_to_factor=65), {"v": False, "ema": True}),
    "factored": (optax.adafactor(1e-2, momentum=0.9, min_dim_size_to_factor=8), {"ema": True}),
    "schedule": (optax.adamw(optax.cosine_decay_schedule(1e-2, 9)), {"mu": True, "nu": False}),
    "inject": (optax.inject_hyperparams(optax.adam)(1e-2), {"mu": True, "nu": False}),
    "multi_steps": (
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        {"mu": True, "nu": False},
    ),
}
INSIDE = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(1e-2)}, lambda p: {name: "b" if name == "head" else "a" for name in p}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(OPTIMIZERS, ("adamw", "sgd", "adafactor")))
def test_every_optimizer_moves_as_without(name):
    tx, kinds = OPTIMIZERS[name]
    params = params_of()
    new, state = run(eight_bit(tx), params)
    wanted = moved(run(tx, params)[0], params)
    found = coded(state)
    assert {path.rpartition(".")[2].split("[")[0]: leaf.signed for path, leaf in found.items()} == kinds
    got = moved(new, params)
    assert np.linalg.norm(got - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(INSIDE, ("masked", "inject")))
def test_inside_other_transformations(name):
    params, wrap = params_of(), INSIDE[name]
    new, state = run(wrap(eight_bit(optax.adamw(1e-2))), params)
    wanted = moved(run(wrap(optax.adamw(1e-2)), params)[0], params)
    assert coded(state)
    assert 0 < np.linalg.norm(moved(new, params) - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_inside_injected_hyperparameters():
    tx = optax.inject_hyperparams(lambda learning_rate: eight_bit(optax.adam(learning_rate)))(1e-2)
    _, state = run(tx, params_of(), steps=2)
    assert coded(state)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    new, _ = run(tx, params_of(), steps=1, state=state)
    assert_close(new, params_of(), 0.0)


@pytest.mark.parametrize("name", all_but_slow(("adamw", "lion", "sgd", "adafactor", "inject"), ("adamw",)))
def test_without_a_large_array_all_is_as_without(name):
    tx = OPTIMIZERS[name][0]
    new, state = run(eight_bit(tx, min_size=10**6), params_of())
    wanted, inner = run(tx, params_of())
    assert_close(new, wanted, 0.0)
    assert_close(state.inner, inner, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("size", all_but_slow((2048, 1), (2048,)))
@pytest.mark.parametrize(
    "name",
    all_but_slow(
        ("adamw", "lion", "amsgrad", "schedule", "inject", "partition", "masked"), ("adamw", "masked")
    ),
)
def test_slices_make_the_same_numbers(name, size):
    wrap = INSIDE.get(name, lambda tx: tx)
    tx = OPTIMIZERS[name][0] if name in OPTIMIZERS else wrap(optax.adam(1e-2))
    whole = run(eight_bit(tx, slice_size=10**9), params_of())
    sliced = run(eight_bit(tx, slice_size=size), params_of())
    assert jax.tree.structure(whole) == jax.tree.structure(sliced)
    got, wanted = moved(sliced[0], params_of()), moved(whole[0], params_of())
    # Rounded differently, a number at the middle between two codes may go to the other.
    assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_slices_are_looped_over_in_what_is_elementwise_only():
    params = params_of()
    for tx, loops in ((optax.adamw(1e-2), 3), (optax.lamb(1e-2), 0)):
        wrapped = eight_bit(tx, slice_size=2048)
        jaxpr = jax.make_jaxpr(wrapped.update)(params, wrapped.init(params), params)
        assert sum(eqn.primitive.name in ("scan", "while") for eqn in jaxpr.eqns) == loops


@pytest.mark.parametrize(
    "fn", [jnp.cumsum, jnp.sort, lambda x: x - x.mean(), lambda x: x[::-1], lambda x: x.T @ x]
)
def test_what_mixes_numbers_is_not_elementwise(fn):
    assert not is_elementwise(fn, jnp.ones((4, 4)))
    assert is_elementwise(lambda x, n: jnp.where(x > 0, jnp.tanh(x) * n, 1.0), jnp.ones((4, 4)), 3)


@pytest.mark.slow
def test_bytes_of_a_state():
    params = {"w": jnp.ones((4, 64, 1024)), "b": jnp.ones(1024)}
    state = eight_bit(optax.adamw(1e-2)).init(params)
    n = 4 * 64 * 1024
    # Two moments of w in codes and scales, two of b in float32, and two counts.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 2 * (n + 4 * n // 256) + 2 * 4096 + 8


@pytest.mark.slow
def test_bfloat16_parameters():
    params = params_of(jnp.bfloat16)
    new, state = run(eight_bit(optax.adamw(1e-2)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == set(
        map(jnp.dtype, ("int32", "uint8", "float32"))
    )


@pytest.mark.slow
def test_a_rate_of_decay_below_bfloat16_is_not_lost():
    # 1e-3 of a square is lost beside 1 in bfloat16's 8 bits, not in the float32 of a step.
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    tx = eight_bit(optax.scale_by_adam(b2=0.999))
    state = tx.init(params)
    for _ in range(20):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(decode(state.inner.nu["w"]), 1 - 0.999**20, rtol=1e-3)


def test_initial_values_that_are_not_zero():
    state = eight_bit(optax.adagrad(1e-2, initial_accumulator_value=0.1)).init(params_of())
    np.testing.assert_allclose(decode(coded(state).popitem()[1]), 0.1, rtol=1e-6)


@pytest.mark.slow
def test_stochastic_rounding_is_of_the_key_the_step_and_the_moment():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    grads = jax.tree.map(lambda _: jax.random.normal(KEY, (64, 64)), params)
    tx = eight_bit(optax.sgd(1.0, momentum=0.9), key=KEY)
    once = tx.update(grads, tx.init(params))[1]
    codes = [leaf.codes for leaf in coded(once).values()]
    assert 0.2 < (codes[0] != codes[1]).mean() < 0.8
    again = tx.update(grads, tx.init(params))[1]
    assert_close([leaf.codes for leaf in coded(again).values()], codes, 0.0)
    later = tx.update(grads, tx.init(params)._replace(step=jnp.int32(1)))[1]
    assert (coded(later).popitem()[1].codes != codes[1]).mean() > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, pytest.param(KEY, marks=pytest.mark.slow)])
def test_sharded_is_as_on_one_device(key):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    specs = {
        "blocks": {"up": (None, "data", "tensor"), "down": (None, "tensor", "data")},
        "head": ("tensor", "data"),
        "bias": ("data",),
    }
    place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
    shardings = jax.tree.map(place, specs, is_leaf=lambda node: isinstance(node, tuple))
    tx = eight_bit(optax.adamw(1e-2), block_size=16, slice_size=2048, key=key)
    one = run(tx, params_of())
    several = run(tx, jax.device_put(params_of(), shardings))
    up = several[1].inner[0].mu["blocks"]["up"]
    assert up.codes.sharding.is_equivalent_to(shardings["blocks"]["up"], 3)
    assert up.scales.sharding.shard_shape(up.scales.shape) == (4, 16, 1)
    assert_close(several[0], one[0], 1e-5)
    different = [
        (a.codes != b.codes).mean() for a, b in zip(coded(one[1]).values(), coded(several[1]).values())
    ]
    assert max(different) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("key", [pytest.param(None, marks=pytest.mark.slow), KEY])
def test_resuming_is_exact(tmp_path, key):
    tx = eight_bit(optax.adamw(1e-2), key=key, slice_size=2048)
    params, state = run(tx, params_of(), steps=3)
    saved = checkpoint.RunState(params, state, KEY, 3, {}, {})
    with checkpoint.open_checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoint.save(checkpoints, saved)
        like = checkpoint.RunState(params_of(), tx.init(params_of()), KEY, 0, {}, {})
        found = checkpoint.restore_latest(checkpoints, like)
    bits = lambda tree: {path: np.asarray(x) for path, x in checkpoint.arrays_by_path(tree).items()}
    jax.tree.map(np.testing.assert_array_equal, bits(found.opt_state), bits(state))
    on = run(tx, found.trainable, state=found.opt_state, first=3)
    straight = run(tx, params_of(), steps=9)
    jax.tree.map(np.testing.assert_array_equal, bits(on), bits(straight))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [optax.adamw, optax.lion])
@pytest.mark.parametrize("key", [None, pytest.param(KEY, marks=pytest.mark.slow)])
def test_training_ends_where_float32_does(optimizer, key):
    x = jax.random.normal(KEY, (256, 64))
    labels = jnp.argmax(
        jnp.tanh(x @ jax.random.normal(jax.random.key(1), (64, 32)))
        @ jnp.ones((32, 8)).at[::2].mul(jax.random.normal(jax.random.key(2), (16, 8))),
        -1,
    )
    start = {
        "in": jax.random.normal(jax.random.key(3), (64, 128)) / 8,
        "out": jax.random.normal(jax.random.key(4), (128, 64)) / 11,
        "head": jnp.zeros((64, 8)),
    }

    def loss(params):
        hidden = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["head"], labels).mean()

    def train(tx):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=60)[1])()

    tx = optimizer(3e-3 if optimizer is optax.adamw else 1e-3)
    wanted, found = train(tx), train(eight_bit(tx, key=key))
    assert wanted[-1] < 0.5 * wanted[0]
    np.testing.assert_allclose(found[-1], wanted[-1], rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pj.lora(rank=8, targets=["w"]),
        pytest.param(pj.snell(rank=8, sparsity=0.4, targets=["w"]), marks=pytest.mark.slow),
    ],
)
def test_with_methods(method):
    params = {"w": {"kernel": jax.random.normal(KEY, (4, 48, 64))}}
    frozen, trainable = method.init(KEY, params)
    tx = method.optimizer(eight_bit(optax.adam(1e-2), min_size=1024))
    state = tx.init(trainable)

    def loss(trainable):
        return jnp.sum((pj.dense(method.apply(frozen, trainable)["w"]["kernel"]) - 1.0) ** 2)

    start = loss(trainable)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert loss(trainable) < start
    assert len(coded(state)) >= 4


def test_unknown_states():
    params = params_of()
    with pytest.raises(pj.PeftError, match=r"only MultiStepsState.acc_grads; say with moments="):
        eight_bit(optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation()).init(params)
    kinds = lambda field: "signed" if field == "MultiStepsState.acc_grads" else "keep"
    tx = eight_bit(optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation(), moments=kinds)
    assert coded(tx.init(params))
    with pytest.raises(pj.PeftError, match=r"moments\('ScaleByAdamState.mu'\) must be one of .*, got None"):
        eight_bit(optax.adam(1e-2), moments=lambda field: None).init(params)
    with pytest.raises(pj.PeftError, match="block_size must be 2 or more"):
        eight_bit(optax.adam(1e-2), block_size=1)
