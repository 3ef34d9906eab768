"""A reversible stack is the plain two-stream network, also differentiated, transformed and adapted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, made_shapes, normal, quick_at

import peftjax as pj
from peftjax.ops.reversible import Coupling, inverse_errors, reversible
from peftjax.planner.flops import count_flops
from peftjax.planner.residuals import kept_arrays

L, B, D = 7, 3, 4
COUPLING = Coupling(0.8, 0.9, swap=True)
LAYERS = {
    "a": 0.5 * normal(KEY, (L, D, D)),
    "b": 0.5 * normal(jax.random.key(1), (L, D, D)),
    "key": jax.random.split(KEY, L),
}
SHARED = {"bias": jnp.full(D, 0.3), "number": jnp.arange(B)}
X = normal(KEY, (B, D))


def f(shared, layer, x):
    kept = jax.random.bernoulli(layer["key"], 0.5, x.shape)
    return jnp.where(kept, jnp.tanh(x @ layer["a"] + shared["bias"]) + shared["number"][:, None], 0)


def g(shared, layer, x):
    return jnp.sin(x @ layer["b"]) * np.float32([1, 2, 1, 2])  # an array of its own


def measured(pair):
    return jnp.sum(jnp.sin(pair[0]) + 2 * pair[1])


def loss(floats, x=X, every=0, coupling=COUPLING):
    layers, shared = {**LAYERS, **floats["layers"]}, {**SHARED, **floats["shared"]}
    return measured(reversible(f, g, (x, x), shared, layers, coupling, every=every))


def plain(floats, x=X, coupling=COUPLING):
    layers, shared = {**LAYERS, **floats["layers"]}, {**SHARED, **floats["shared"]}

    def step(pair, layer):
        return coupling.forward(lambda x: f(shared, layer, x), lambda x: g(shared, layer, x), pair), None

    return measured(jax.lax.scan(step, (x, x), layers)[0])


FLOATS = {"layers": {name: LAYERS[name] for name in "ab"}, "shared": {"bias": SHARED["bias"]}}
XS = jnp.stack([X, 2 * X])


@pytest.mark.parametrize(
    ("every", "swap"), quick_at([(0, True), (0, False), (1, True), (3, True), (L - 1, False)], 0, 3)
)
def test_values_and_gradients(every, swap):
    coupling = Coupling(0.8, 0.9, swap)
    got = jax.jit(jax.value_and_grad(lambda v, x: loss(v, x, every, coupling), (0, 1)))(FLOATS, X)
    assert_close(got, jax.jit(jax.value_and_grad(lambda v, x: plain(v, x, coupling), (0, 1)))(FLOATS, X))


TRANSFORMED = {
    "nothing": lambda f: jax.grad(lambda v: f(v)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f), (None, 0)),
    "grad of vmap": lambda f: jax.grad(lambda v: jax.vmap(f, (None, 0))(v, XS).sum()),
    "vmap over layers": lambda f: jax.grad(
        lambda v: jax.vmap(f)(jax.tree.map(lambda leaf: leaf[None], v), X[None])[0]
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda v: f(v))),
    "checkpoint in scan": lambda f: jax.grad(
        lambda v: jax.lax.scan(lambda s, x: (s + jax.checkpoint(f)(v, x), None), 0.0, XS)[0]
    ),
}


@pytest.mark.parametrize("name", quick_at(TRANSFORMED, 0, 1, 5))
def test_transformed(name):
    inputs = (FLOATS, XS) if name == "vmap of grad" else (FLOATS,)
    wrap = (lambda f: f) if name == "nothing" else jax.jit
    assert_close(wrap(TRANSFORMED[name](loss))(*inputs), wrap(TRANSFORMED[name](plain))(*inputs))


@pytest.mark.parametrize("kind", quick_at(["shard_map", "Auto", "Explicit"], 0))
def test_sharded_over_the_batch(kind):
    kind_of_axis = AxisType.Auto if kind == "shard_map" else AxisType[kind]
    mesh = jax.make_mesh((B,), ("data",), devices=jax.devices()[:B], axis_types=(kind_of_axis,))
    layers = {name: LAYERS[name] for name in "ab"}
    branches = (lambda s, own, x: jnp.tanh(x @ own["a"] + s), lambda s, own, x: jnp.sin(x @ own["b"]))

    def of(layers, x):
        return measured(reversible(*branches, (x, x), SHARED["bias"], layers, COUPLING, every=3))

    def over_devices(layers, x):
        spread = jax.shard_map(
            lambda layers, x: jax.lax.psum(of(layers, x), "data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        return spread(layers, x)

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        got = jax.jit(jax.grad(over_devices if kind == "shard_map" else of))(layers, x)
    assert_close(got, jax.jit(jax.grad(of))(layers, X))


def test_what_backward_keeps_is_one_pair_for_each_segment():
    def kept(every):
        return sorted(a.shape for a in kept_arrays(lambda v: loss(v, every=every), FLOATS) if a.ndim > 2)

    assert kept(0) == [(1, B, D)] * 2
    assert kept(3) == [(3, B, D)] * 2


def test_no_gradient_is_computed_of_what_is_not_differentiated():
    """Backward makes products of the shape of a layer's kernel for those that move, and for no other."""

    def products(*names):
        def of(some):
            return loss({"layers": {**FLOATS["layers"], **some}, "shared": {}})

        moving = {name: LAYERS[name] for name in names}
        jaxpr = jax.make_jaxpr(jax.grad(of))(moving)
        return sum(eqn_shape == (D, D) for eqn_shape in made_shapes(jaxpr.jaxpr))

    x_alone = jax.make_jaxpr(jax.grad(lambda x: loss(FLOATS, x)))(X)
    assert (D, D) not in set(made_shapes(x_alone.jaxpr))
    assert 0 < products("a") < products("a", "b")


def test_forward_mode_is_the_slope_along_the_gradient():
    _, slope = jax.jvp(loss, (FLOATS,), (FLOATS,))
    pairs = zip(jax.tree.leaves(jax.grad(loss)(FLOATS)), jax.tree.leaves(FLOATS))
    assert_close(slope, sum(jnp.vdot(g, v) for g, v in pairs), 1e-4)


@pytest.mark.slow
def test_structured_weights_get_their_own_gradients_and_no_dense_one():
    params = {"a": {"kernel": LAYERS["a"]}, "b": {"kernel": LAYERS["b"]}}
    method = pj.lora(rank=1, targets=["a", "b"])
    frozen, trainable = method.init(KEY, params)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)

    def of(run):
        def value(trainable, frozen, x):
            def forward(params, x):
                return run({"layers": {n: params[n]["kernel"] for n in "ab"}, "shared": {}}, x)

            return pj.adapt(forward)(method.apply(frozen, trainable), x)

        return jax.value_and_grad(value)

    got = jax.jit(of(jax.checkpoint(lambda v, x: loss(v, x, 3))))(trainable, frozen, X)
    assert_close(got, jax.jit(of(plain))(trainable, frozen, X))
    over_rows = lambda v, xs: jnp.sum(jax.vmap(loss, (None, 0))(v, xs))
    for run, x in ((loss, X), (over_rows, XS)):
        jaxpr = jax.make_jaxpr(of(run))(trainable, frozen, x)
        assert not {(D, D), (L, D, D)} & set(made_shapes(jaxpr.jaxpr))


def test_its_flops_are_counted():
    counts = [count_flops(jax.make_jaxpr(of)(FLOATS)) for of in (loss, plain)]
    assert counts[0] == counts[1]
    assert counts[0].total == 2 * L * 2 * B * D * D


@pytest.mark.parametrize(
    ("coupling", "bound"), quick_at([((0.1, 1.0), 1e-4), ((0.1, 0.1), 1e-4), ((1.0, 1.0), 1e-5)], 1)
)
def test_the_inverse_of_one_layer_gives_its_inputs(coupling, bound):
    layers = jax.tree.map(lambda leaf: leaf[:1], LAYERS)
    (error,) = inverse_errors(f, g, (X, -X), SHARED, layers, Coupling(*coupling, swap=False))
    assert 0 < float(error) < bound


def test_errors_grow_between_kept_pairs_only():
    errors = inverse_errors(f, g, (X, X), SHARED, LAYERS, Coupling(0.1, 1.0, swap=True), every=3)
    assert [float(error) == 0 for error in errors] == [False, True, False, False, True, False, False]
    assert float(errors[2]) > float(errors[3])
