"""Sharded runs equal the single-device run: GSPMD (Auto axes), explicit shardings, shard_map."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, all_but_slow, assert_close, example_of, noisy, normal, quick_at

import peftjax as pj
from peftjax.transform.optimizer_state import OptimizerState

D, F, L = 16, 32, 2
X = normal(KEY, (8, 4, D))


def make_params():
    keys = jax.random.split(KEY, 2)
    up, down = jax.random.normal(keys[0], (L, D, F)), jax.random.normal(keys[1], (L, F, D))
    return {"blocks": {"up": {"kernel": 0.1 * up}, "down": {"kernel": 0.1 * down}}}


SPECS = {
    "blocks": {"up": {"kernel": P(None, "fsdp", "tensor")}, "down": {"kernel": P(None, "tensor", "fsdp")}}
}


def model(params, x):
    def block(x, layer):
        h = jnp.tanh(x @ layer["up"]["kernel"])
        return x + h @ layer["down"]["kernel"], None

    return lax.scan(block, x, params["blocks"])[0]


def loss_and_grad(method, frozen, trainable, x):
    def loss(trainable, frozen, x):
        return jnp.sum(jnp.sin(pj.adapt(model)(method.apply(frozen, trainable), x)))

    return jax.jit(jax.value_and_grad(loss))(trainable, frozen, x)


METHODS = {
    "lora": pj.lora(rank=2),
    "dora": pj.dora(rank=2),
    "paca": pj.paca(rank=4),
    "shira": pj.shira(rank=2),
    "sara": pj.sara(density=0.2),
    "snell": pj.snell(rank=8, sparsity=0.3, coefficient=1.0),
    # Without the allocations between steps, so that it may be applied as it starts.
    "snella": replace(pj.snella(rank=8, total_steps=20, initial_sparsity=0.3, coefficient=1.0), advances=()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(METHODS, ("lora", "shira", "snell")))
def test_gspmd(name):
    method = METHODS[name]
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    params = make_params()
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable)
    want = loss_and_grad(method, frozen, trainable, X)

    spread = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, SPECS)
    frozen, _ = method.init(KEY, spread)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    trainable = jax.device_put(trainable, NamedSharding(mesh, P()))
    assert_close(loss_and_grad(method, frozen, trainable, x), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(("paca", "shira"), ("paca",)))
def test_gspmd_in_place(name):
    """A base that holds the trained values has its shardings, and the step on it is the same."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    method = getattr(pj, name)(rank=2, in_place=True)
    frozen, trainable = method.init(KEY, make_params())
    trainable = noisy(trainable)
    want = loss_and_grad(method, frozen, trainable, X)
    params = make_params()
    spread = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, SPECS)
    trainable = jax.device_put(trainable, NamedSharding(mesh, P()))
    shardings = [leaf.sharding for leaf in jax.tree.leaves(spread)]
    frozen, trainable = jax.jit(method.close, donate_argnums=0)(method.init(KEY, spread)[0], trainable)
    assert frozen.plan.closed
    for leaf, before in zip(jax.tree.leaves(frozen.params), shardings):
        assert leaf.sharding.is_equivalent_to(before, leaf.ndim)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    assert_close(loss_and_grad(method, frozen, trainable, x), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "snell"])
def test_shard_map_over_a_sharded_weight(name):
    method = METHODS[name]
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def column_then_row(params, x):
        def local(x, up, down):
            return lax.psum(jnp.tanh(x @ up) @ down, "tensor")

        call = jax.shard_map(
            local, mesh=mesh, in_specs=(P("fsdp"), P(None, "tensor"), P("tensor", None)), out_specs=P("fsdp")
        )
        return call(x, params["up"]["kernel"], params["down"]["kernel"])

    params = jax.tree.map(lambda leaf: leaf[0], make_params()["blocks"])
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable)

    def total(trainable, merged):
        weights = method.merge(frozen, trainable) if merged else method.apply(frozen, trainable)
        return jnp.sum(jnp.sin(pj.adapt(column_then_row)(weights, X[:, 0])))

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    assert_close(run(trainable, False), run(trainable, True))


@pytest.mark.parametrize("name", ["lora", "dora", "snell"])
@pytest.mark.parametrize("axis", quick_at([0, 1], 0))
def test_a_weight_gathered_inside_shard_map(axis, name):
    method = METHODS[name]
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spec = P(*("fsdp" if n == axis else None for n in range(2)))

    def forward(params, x):
        def local(w, x):
            return jnp.tanh(x @ lax.all_gather(w, "fsdp", axis=axis, tiled=True))

        call = jax.shard_map(
            local, mesh=mesh, in_specs=(spec, P(("data", "fsdp"))), out_specs=P(mesh.axis_names)
        )
        return call(params["kernel"], x)

    frozen, trainable = method.init(KEY, {"kernel": make_params()["blocks"]["up"]["kernel"][0]})
    trainable = noisy(trainable)

    def total(trainable, merged):
        weights = (method.merge if merged else method.apply)(frozen, trainable)
        return jnp.sum(jnp.sin(pj.adapt(forward)(weights, X[:, 0])))

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    assert_close(run(trainable, False), run(trainable, True))


@pytest.mark.slow
def test_dora_looks_up_the_rows_of_a_divided_vocabulary():
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Auto,))
    ids = jnp.array([0, 3, 9, 15])

    def local(table, ids):
        at = ids - lax.axis_index("vocab") * table.shape[0]
        mine = (at >= 0) & (at < table.shape[0])
        return lax.psum(jnp.where(mine[:, None], table[jnp.where(mine, at, 0)], 0.0), "vocab")

    def forward(params, ids):
        specs = (P("vocab"), P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(params["table"], ids)

    method = pj.dora(rank=2, targets=["table"])
    frozen, trainable = method.init(KEY, {"table": jax.random.normal(KEY, (16, 6))})
    trainable = noisy(trainable)
    got = pj.adapt(forward)(method.apply(frozen, trainable), ids)
    assert_close(got, method.merge(frozen, trainable)["table"][ids])


@pytest.mark.parametrize("name", ["paca", "shira", "snella"])
def test_what_needs_a_whole_axis_refuses_a_part_of_it(name):
    method = METHODS[name]
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    frozen, trainable = method.init(KEY, {"kernel": jnp.ones((D, F))})

    def forward(params, x):
        axis = name == "snella"  # rows are numbered over the inputs, a softmax is over the outputs
        specs = (P(None, "t"), P()) if axis else (P("t"), P(None, "t"))
        out = P(None, "t") if axis else P()
        local = (lambda w, x: x @ w) if axis else (lambda w, x: lax.psum(x @ w, "t"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(params["kernel"], x)

    with pytest.raises(pj.PeftError, match="shard_map"):
        pj.adapt(forward)(method.apply(frozen, trainable), X[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(("lora", "paca", "snell", "snella"), ("lora", "snell")))
@pytest.mark.parametrize("sharded_input", all_but_slow((False, True), (True,)))
def test_explicit_shardings(sharded_input, name):
    method = METHODS[name]
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    params = jax.tree.map(lambda leaf: leaf[0], make_params()["blocks"])
    specs = {"up": {"kernel": P(None, "tensor")}, "down": {"kernel": P("tensor", None)}}

    def forward(params, x):
        h = jnp.tanh(x @ params["up"]["kernel"])
        return jnp.einsum("btf,fd->btd", h, params["down"]["kernel"], out_sharding=P("data"))

    def plain(params, x):
        return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable)
    want = jax.grad(lambda t: jnp.sum(jnp.sin(plain(method.merge(frozen, t), X))))(trainable)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs
        )
        x = jax.device_put(X, NamedSharding(mesh, P("data" if sharded_input else None)))
        frozen, _ = method.init(KEY, spread)
        got = jax.jit(jax.grad(lambda t, f, x: jnp.sum(jnp.sin(pj.adapt(forward)(method.apply(f, t), x)))))(
            trainable, frozen, x
        )
    assert_close(got, want)


# Those that merge, and find something to train, in the model below: it has layers without a bias and no norm.
SIMPLE = [
    name
    for name, info in pj.METHODS.items()
    if info.mergeable and not info.of_blocks and name not in ("beft", "ln_tuning")
]
QUICK = ("pissa", "olora", "shira", "sara", "galore", "rows")
WHOLE_SPECS = {
    "embedding": P(None, "tensor"),
    "up": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
    "head": {"kernel": P("tensor", "fsdp")},
}


def everything():
    keys = jax.random.split(KEY, 3)
    return {
        "embedding": jax.random.normal(keys[0], (16, D)),
        "up": {"kernel": jax.random.normal(keys[1], (D, F)) / 4, "bias": jnp.zeros(F)},
        "head": {"kernel": jax.random.normal(keys[2], (F, D)) / 6},
    }


def run_of(method, params, ids, explicit):
    """Loss, gradients and the merged model of a start on `params` that has advanced by all that it does."""
    rows = {"out_sharding": P("data")} if explicit else {}
    wide = {"out_sharding": P("data", None, "tensor")} if explicit else {}

    def forward(params, ids):
        x = params["embedding"].at[ids].get(**rows)
        h = jnp.tanh(jnp.einsum("btd,df->btf", x, params["up"]["kernel"], **wide) + params["up"]["bias"])
        return jnp.einsum("btf,fd->btd", h, params["head"]["kernel"], **rows)

    def loss_of(params):
        return jnp.sum(jnp.sin(pj.adapt(forward)(params, ids)))

    frozen, trainable = method.init(KEY, params)

    @jax.jit
    def run(trainable, frozen):
        tx = method.optimizer(optax.adam(1e-3))
        state = OptimizerState(tx.init(trainable), tx, trainable)
        for advance in method.advances:
            for part in range(advance.parts(frozen)):
                options = {"step": jnp.int32(3), "key": jax.random.key(3), "part": part}
                frozen, trainable, state = advance.run(loss_of, frozen, trainable, state, **options)
        frozen = replace(frozen, advanced=True)
        loss, gradients = jax.value_and_grad(lambda t: loss_of(method.apply(frozen, t)))(trainable)
        return loss, gradients, method.merge(frozen, trainable)

    return run(trainable, frozen)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(SIMPLE, QUICK))
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_every_method_starts_and_runs_on_sharded_parameters(kind, name):
    method, params = example_of(name), everything()
    ids = jnp.arange(32).reshape(8, 4) % 16
    want = run_of(method, params, ids, False)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, WHOLE_SPECS
        )
        ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
        got = run_of(method, spread, ids, kind == AxisType.Explicit)
        assert_close(jax.device_get(got), jax.device_get(want), 1e-4)
