"""PEQA: the scales of codes, trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import KEY, noisy, quick_at

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.quantize.codes import decode
from peftjax.testing.comparisons import assert_close

PARAMS = {
    "up": {"kernel": jax.random.normal(KEY, (16, 6))},
    "down": {"kernel": jax.random.normal(KEY, (6, 8))},
}
X = jax.random.normal(KEY, (5, 16))
OPTIONS = [{}, {"format": "int3", "group": 2}, {"format": "nf4", "group": 2, "affine": False}]


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params, x):
    return jnp.sum(jnp.sin(model(params, x)))


def quantized(**options):
    return pj.quantized(**{"group": -1, "affine": True, "format": "int4", **options})


def expected(frozen, trainable):
    """The dense weights, and how they follow from the trained changes."""

    def weight(w, change):
        scales = decode(w.codes.scales) + change.swapaxes(-1, -2)
        return (w.codes.units * w.codes.by_number(scales)).T

    leaves = tree.named_leaves(frozen.params)
    return tree.replace(
        frozen.params, {path: weight(leaves[path], own["change"]) for path, own in trainable.items()}
    )


@pytest.mark.parametrize("options", quick_at(OPTIONS, 0), ids=["int4", "int3 grouped", "nf4 grouped"])
def test_it_starts_as_the_rounded_model_and_its_gradients_are_those_of_the_dense_weights(options):
    method = pj.peqa(**options)
    frozen, fresh = method.init(KEY, PARAMS)
    assert not any(np.any(own["change"]) for own in fresh.values())
    plain = quantized(**options)
    rounded = plain.merge(*plain.init(KEY, PARAMS))
    moved = noisy(fresh)

    @jax.jit
    def found(trainable, x):
        return jax.value_and_grad(lambda t, x: pj.adapt(loss)(method.apply(frozen, t), x), (0, 1))(
            trainable, x
        )

    wanted = jax.jit(jax.value_and_grad(lambda t, x: loss(expected(frozen, t), x), (0, 1)))
    assert_close(found(fresh, X)[0], loss(rounded, X))
    assert_close(method.merge(frozen, fresh), rounded)
    assert_close(found(moved, X), wanted(moved, X), 1e-4)
    assert_close(method.merge(frozen, moved), expected(frozen, moved))


def test_training_leaves_the_codes_and_a_task_is_its_scales(tmp_path):
    method, tasks = pj.peqa(), []
    frozen, _ = method.init(KEY, PARAMS)
    before = [np.array(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]
    for seed in (1, 2):
        _, trainable = method.init(KEY, PARAMS)
        assert tree.count(trainable) == 6 + 8
        gradient = jax.grad(lambda t: pj.adapt(loss)(method.apply(frozen, t), X))(trainable)
        tx = optax.adam(1e-2 * seed)
        updates, _ = tx.update(gradient, tx.init(trainable))
        trainable = optax.apply_updates(trainable, updates)
        save_adapter(tmp_path / str(seed), method, frozen, trainable, seed=0)
        tasks.append(pj.adapt(model)(method.apply(frozen, trainable), X))
    assert [np.array(leaf).tobytes() for leaf in jax.tree.leaves(frozen)] == before
    assert np.abs(tasks[0] - tasks[1]).max() > 1e-3
    for seed, out in zip((1, 2), tasks):
        found = load_adapter(tmp_path / str(seed), PARAMS)
        np.testing.assert_array_equal(pj.adapt(model)(method.apply(frozen, found.trainable), X), out)


def test_scales_times_c_are_outputs_times_c():
    method = pj.peqa(targets=["down"])
    frozen, trainable = method.init(KEY, PARAMS)
    scales = decode(frozen.params["down"]["kernel"].codes.scales)
    doubled = {"down/kernel": {"change": scales.T}}
    run = pj.adapt(model)
    assert_close(run(method.apply(frozen, doubled), X), 2 * run(method.apply(frozen, trainable), X))


@pytest.mark.parametrize(("group", "kept"), [(-1, "u"), (4, "x")])
def test_backward_keeps_u_and_not_x_or_x_with_groups_and_never_a_weight(group, kept):
    width, out, tokens = 96, 40, 7
    method = pj.peqa(group=group, targets="w")
    frozen, trainable = method.init(KEY, {"w": jnp.ones((width, out))})
    x = jnp.ones((tokens, width))

    def residuals(trainable, x):
        run = pj.adapt(lambda params, x: x @ params["w"])
        return jax.vjp(lambda t, x: run(method.apply(frozen, t), x), trainable, x)[1]

    shapes = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(residuals, trainable, x))}
    assert ((tokens, out) in shapes) == (kept == "u")
    assert ((tokens, width) in shapes) == (kept == "x")
    floats = [
        leaf
        for leaf in jax.tree.leaves(jax.eval_shape(residuals, trainable, x))
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= width * out
    ]
    assert not floats


def test_it_trains_the_scales_of_codes_that_are_there():
    method = pj.chain(pj.quantized(format="int4", group=2), pj.peqa())
    frozen, trainable = method.init(KEY, PARAMS)
    assert trainable["peqa"]["up/kernel"]["change"].shape == (8, 6)
    base = pj.quantized(format="int4", group=2)
    assert_close(method.merge(frozen, trainable), base.merge(*base.init(KEY, PARAMS)))
    with pytest.raises(PeftError, match="run on from row to row"):
        pj.chain(pj.nf4(), pj.peqa()).init(KEY, PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("group", [-1, 16])
def test_scales_and_their_changes_are_sharded_as_the_weight(group):
    """Inside a scan, and inside `shard_map`: the step is that of one device."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    w, x = 0.1 * jax.random.normal(KEY, (2, 128, 128)), jax.random.normal(KEY, (8, 128))
    method = pj.peqa(group=group)

    def step(frozen, trainable, x, inner):
        def loss(trainable):
            def layers(params, x):
                return jax.lax.scan(
                    lambda x, w: (jnp.tanh(inner(x, w)), None), x, params["blocks"]["kernel"]
                )[0]

            return jnp.sum(pj.adapt(layers)(method.apply(frozen, trainable), x) ** 2)

        return jax.value_and_grad(loss)(trainable)

    def product(x, w):
        return x @ w

    def in_shards(x, w):
        specs = (PartitionSpec("data", "tensor"), PartitionSpec("tensor"))
        return jax.shard_map(
            lambda x, w: jax.lax.psum(x @ w, "tensor"),
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec("data"),
        )(x, w)

    frozen, fresh = method.init(KEY, {"blocks": {"kernel": w}})
    trainable = noisy(fresh, scale=0.01)
    run = jax.jit(step, static_argnums=3)
    want = run(frozen, trainable, x, product)
    assert_close(run(frozen, trainable, x, in_shards), want, 1e-4)
    for spec in (PartitionSpec(None, "tensor"), PartitionSpec(None, "data", "tensor")):
        placed = {"blocks": {"kernel": jax.device_put(w, NamedSharding(mesh, spec))}}
        assert_close(run(method.init(KEY, placed)[0], trainable, x, product), want, 1e-4)
