"""NaP: the sphere is kept, nothing else changes, and a normalized network does not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optimizer_checks import (
    PARAMS,
    assert_keeps_dtypes,
    assert_resumes,
    assert_sharded_equals_one_device,
    random_like,
    train,
)
from support import assert_close, quick_at

import peftjax as pj
from peftjax.core.tree import named_leaves, replace
from peftjax.testing import check_optimizer

nap = pj.optim.normalize_and_project


def norms_of(tree):
    """The norm of every matrix of every stack, in float64."""
    return {
        path: np.sqrt(np.square(np.asarray(leaf, np.float64)).sum((-2, -1)))
        for path, leaf in named_leaves(tree).items()
        if path.endswith("kernel")
    }


# The sphere.


def test_every_matrix_of_every_stack_keeps_its_norm_and_the_rest_moves_as_before():
    tx = optax.adam(0.3)
    params, state = PARAMS, nap(tx).init(PARAMS)
    for t in range(3):
        params, state = train(nap(tx), params, range(t, t + 1), state)
        for path, norm in norms_of(params).items():
            if path != "head/kernel":
                np.testing.assert_allclose(norm, norms_of(PARAMS)[path], rtol=1e-6)
    free, _ = train(tx, PARAMS, range(3))
    assert abs(norms_of(free)["blocks/down/kernel"] / norms_of(PARAMS)["blocks/down/kernel"] - 1).min() > 0.01
    for path in ("query", "down"):
        del free["blocks"][path]["kernel"], params["blocks"][path]["kernel"]
    assert_close(params, free, 1e-6)


def test_the_direction_is_that_of_the_step_inside():
    got, _ = train(nap(optax.adam(0.3)), PARAMS, range(1))
    want, _ = train(optax.adam(0.3), PARAMS, range(1))
    got, want = (tree["blocks"]["query"]["kernel"] for tree in (got, want))
    norm = lambda w: jnp.linalg.norm(w, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(got / norm(got), want / norm(want), atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), quick_at([("float32", 1e-6), ("bfloat16", 1e-3)], 0))
def test_a_thousand_steps_do_not_move_the_norm(dtype, bound):
    params = {"up": random_like(jnp.zeros((32, 32), dtype), 0)}
    tx, pull = nap(optax.adam(3e-3)), random_like(jnp.zeros((32, 32)), 1)

    def step(t, carry):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), pull.shape)
        updates, state = tx.update({"up": (noise + pull).astype(dtype)}, state, params)
        return optax.apply_updates(params, updates), state

    moved, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, 1000, step, carry))((params, tx.init(params)))
    norm = lambda tree: np.linalg.norm(np.asarray(tree["up"], np.float64))
    assert moved["up"].dtype == dtype
    assert float(jnp.abs(moved["up"] - params["up"]).mean()) > 0.1
    assert norm(moved) == pytest.approx(norm(params), rel=bound)


def test_zero_matrices_are_free_and_no_step_makes_one():
    params = {"zero": jnp.zeros((3, 4)), "up": jnp.ones((3, 4))}
    tx = nap(optax.sgd(1.0))
    updates, _ = tx.update({"zero": jnp.ones((3, 4)), "up": jnp.ones((3, 4))}, tx.init(params), params)
    np.testing.assert_array_equal(updates["zero"], -1.0)
    np.testing.assert_array_equal(updates["up"], 0.0)


# A network with a norm after every linear layer.

NET = random_like(
    {"first": (4, 8), "norm": {"scale": (8,), "bias": (8,)}, "second": (8, 6), "head": {"kernel": (6, 2)}}, 5
)
INPUTS, WANTED = random_like((7, 4), 6), random_like((7, 2), 7)


def normalized(x):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))


def outputs(net, x):
    x = normalized(x @ net["first"]) * net["norm"]["scale"] + net["norm"]["bias"]
    x = normalized(jax.nn.relu(x) @ net["second"])
    return x @ net["head"]["kernel"]


GRADIENT = jax.jit(jax.grad(lambda net: jnp.mean(jnp.square(outputs(net, INPUTS) - WANTED))))


def after(tx, net=NET):
    updates, _ = tx.update(GRADIENT(net), tx.init(net), net)
    return optax.apply_updates(net, updates)


@pytest.mark.slow
@pytest.mark.parametrize("norms", [None, ["norm"]])
def test_the_outputs_are_those_without_the_projection(norms):
    tx = optax.adam(0.3)
    projected, free = after(nap(tx, norms=norms)), after(tx)
    assert float(jnp.linalg.norm(free["second"]) / jnp.linalg.norm(NET["second"])) > 1.003
    assert float(jnp.abs(outputs(free, INPUTS) - outputs(NET, INPUTS)).max()) > 0.1
    assert_close(outputs(projected, INPUTS), outputs(free, INPUTS), 1e-5)


def test_gradients_are_orthogonal_to_what_is_projected():
    gradient = GRADIENT(NET)
    for name in ("first", "second"):
        along = jnp.vdot(gradient[name], NET[name])
        assert abs(float(along / jnp.linalg.norm(gradient[name]) / jnp.linalg.norm(NET[name]))) < 1e-6
    of_pair = jax.tree.map(lambda g, w: jnp.vdot(g, w), gradient["norm"], NET["norm"])
    assert abs(float(of_pair["scale"] + of_pair["bias"])) < 1e-6 < abs(float(of_pair["scale"]))


def test_sgd_goes_where_sgd_with_rates_scaled_by_the_norm_goes():
    tx, rate = nap(optax.sgd(0.3), norms=["norm"]), 0.3
    free, on_sphere, state = NET, NET, tx.init(NET)
    rho = {name: optax.tree.norm(NET[name]) for name in ("first", "second", "norm")}
    for _ in range(5):
        updates, state = tx.update(GRADIENT(on_sphere), state, on_sphere)
        on_sphere, gradient = optax.apply_updates(on_sphere, updates), GRADIENT(free)
        rates = {"head": rate} | {n: rate * (optax.tree.norm(free[n]) / rho[n]) ** 2 for n in rho}
        step = {n: optax.tree.scale(-rates[n], gradient[n]) for n in free}
        free = optax.apply_updates(free, step)
    for name in rho:
        stretched = optax.tree.norm(free[name]) / rho[name]
        assert float(stretched) > 1.003
        assert_close(on_sphere[name], optax.tree.scale(1 / stretched, free[name]), 1e-5)
    assert_close(on_sphere["head"], free["head"], 1e-5)


# Names and axes.


def test_a_norm_and_its_bias_share_a_sphere_and_layers_do_not():
    params = replace(PARAMS, {"blocks/norm/bias": jnp.zeros((2, 8))})
    moved, _ = train(nap(optax.adam(0.3), norms=r".*norm"), params, range(2))
    length = lambda tree: sum(jnp.sum(x**2, 1) for x in tree["blocks"]["norm"].values())
    np.testing.assert_allclose(length(moved), length(params), rtol=1e-6)
    assert float(jnp.abs(moved["blocks"]["norm"]["bias"]).min()) > 0


def spheres(params=PARAMS, **options):
    return {name: rho.shape for name, rho in nap(optax.sgd(0.1), **options).init(params).norms.items()}


def test_names_choose_and_layouts_tell_what_one_matrix_is():
    assert spheres() == {"blocks/down/kernel": (2, 1, 1), "blocks/query/kernel": (2, 1, 1)}
    assert spheres(exclude=["query"], layouts={"down": "iio"}) == {"blocks/down/kernel": (1, 1, 1)}
    assert spheres(targets=["head"]) == {"head/kernel": (1, 1)}
    whole = pj.full().init(jax.random.key(0), PARAMS)[1]
    assert spheres(whole) == spheres()


def test_wrong_names_are_errors():
    _, factors = pj.lora(rank=2).init(jax.random.key(0), PARAMS)
    for options, message in (
        ({"targets": ["qery"]}, "target 'qery' matched no parameter; closest: .*query"),
        ({"norms": ["normm"]}, "target 'normm' matched no parameter; closest: .*norm"),
        ({"layouts": {"qery": "sio"}}, "'qery' matched no target"),
        ({"params": factors, "strict": True}, "no parameter this method can adapt"),
    ):
        with pytest.raises(pj.PeftError, match=f"normalize_and_project: .*{message}"):
            spheres(**options)
    with pytest.raises(pj.PeftError, match="give the parameters too"):
        nap(optax.sgd(0.1)).update(PARAMS, nap(optax.sgd(0.1)).init(PARAMS))


# Inside optax, on meshes, from checkpoints.


INJECTED = optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-1, 1e-2, 4))
SCHEDULED = nap(INJECTED, norms=["norm"])


@pytest.mark.slow
def test_works_inside_optax_sharded_and_resumed(tmp_path):
    check_optimizer(SCHEDULED)
    assert_sharded_equals_one_device(SCHEDULED)
    assert_resumes(SCHEDULED, tmp_path)


@pytest.mark.slow
def test_works_on_meshes_with_explicit_axes():
    assert_sharded_equals_one_device(SCHEDULED, AxisType.Explicit)


@pytest.mark.slow
def test_keeps_dtypes():
    assert_keeps_dtypes(nap(pj.optim.adamw(1e-2, state_dtype="float32")))
