"""Forward mode and second derivatives through every rule that the library writes itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, all_but_slow, assert_close, quick_at

import peftjax as pj
from peftjax.core.derivatives import with_backward
from peftjax.ops.coded.activation import GRIDS, activate
from peftjax.ops.coded.recompute import recomputed_from_codes
from peftjax.ops.reversible import Coupling, reversible
from peftjax.quantize.affine import encode

PARAMS = {"up": {"kernel": jax.random.normal(KEY, (6, 8))}}
X = jax.random.normal(jax.random.key(1), (5, 6))
METHODS = {
    "paca": pj.paca(rank=2),
    "shira": pj.shira(density=0.2),
    "sara": pj.sara(density=0.2, penalty=0.0),
    "snell": pj.snell(rank=2, coefficient=1.0),
    "snella": pj.snella(rank=2, total_steps=10, coefficient=1.0),
    "dora": pj.dora(rank=2),
}


def forward(params):
    return jnp.tanh(X @ params["up"]["kernel"])


def floats_of(tree):
    """The floating-point leaves, and how a tree is made of others."""
    leaves, structure = jax.tree.flatten(tree)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def build(floats):
        given = iter(floats)
        return jax.tree.unflatten(structure, [next(given) if m else leaf for m, leaf in zip(moves, leaves)])

    return [leaf for leaf, does in zip(leaves, moves) if does], build


def trained(method, seed=2):
    frozen, trainable = method.init(KEY, PARAMS)
    floats, build = floats_of(trainable)
    keys = jax.random.split(jax.random.key(seed), len(floats))
    frozen = replace(frozen, advanced=True)
    return frozen, [leaf + 0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, floats)], build


def along(floats):
    keys = jax.random.split(jax.random.key(3), len(floats))
    return [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, floats)]


def vdot(left, right):
    return sum(jnp.vdot(a, b) for a, b in zip(left, right))


def hessian_products(loss, floats, v):
    """H v forward over reverse, reverse over forward and reverse over reverse."""
    yield jax.jit(lambda at: jax.jvp(jax.grad(loss), (at,), (v,))[1])(floats)
    yield jax.jit(jax.grad(lambda at: jax.jvp(loss, (at,), (v,))[1]))(floats)
    yield jax.jit(jax.grad(lambda at: vdot(jax.grad(loss)(at), v)))(floats)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_slow(METHODS, ("paca", "shira", "sara", "snell", "dora")))
def test_forward_mode_and_hessian_products_are_those_of_the_merged_model(name):
    method = METHODS[name]
    frozen, floats, build = trained(method)
    v = along(floats)
    loss = lambda at: jnp.sum(jnp.sin(pj.adapt(forward)(method.apply(frozen, build(at)))))
    merged = lambda at: jnp.sum(jnp.sin(forward(method.merge(frozen, build(at)))))
    slope = jax.jit(lambda at: jax.jvp(loss, (at,), (v,))[1])(floats)
    assert_close(slope, jax.jvp(merged, (floats,), (v,))[1], 1e-4)
    assert_close(slope, vdot(jax.grad(loss)(floats), v), 1e-3)
    wanted = jax.jit(jax.grad(lambda at: vdot(jax.grad(merged)(at), v)))(floats)
    assert max(float(jnp.abs(w).max()) for w in wanted) > 0.01
    for product in hessian_products(loss, floats, v):
        assert_close(product, wanted, 2e-3)


@pytest.mark.parametrize(
    ("plain", "inside"),
    quick_at(
        [
            (METHODS["paca"], pj.paca(rank=2, in_place=True)),
            (METHODS["shira"], pj.shira(density=0.2, in_place=True)),
        ],
        0,
    ),
)
def test_weights_that_hold_their_trained_values_have_the_derivatives_of_the_others(plain, inside):
    frozen, floats, build = trained(plain)
    held, trainable = inside.init(KEY, PARAMS)
    _, build_inside = floats_of(trainable)
    held, _ = inside.close(held, build_inside(floats))
    loss = lambda at: jnp.sum(jnp.sin(pj.adapt(forward)(plain.apply(frozen, build(at)))))
    loss_inside = lambda at: jnp.sum(jnp.sin(pj.adapt(forward)(inside.apply(held, build_inside(at)))))
    v = along(floats)
    assert_close(jax.jvp(loss_inside, (floats,), (v,)), jax.jvp(loss, (floats,), (v,)), 1e-4)
    wanted = next(hessian_products(loss, floats, v))
    for product in hessian_products(loss_inside, floats, v):
        assert_close(product, wanted, 1e-4)


@pytest.mark.slow
def test_a_nuclear_penalty_is_no_part_of_the_value_and_a_part_of_each_gradient():
    with_penalty, without = pj.sara(density=0.2, penalty=0.5, polar="svd"), METHODS["sara"]
    frozen, floats, build = trained(with_penalty)
    v = along(floats)
    loss, plain = (
        lambda at, m=m: jnp.sum(jnp.sin(pj.adapt(forward)(m.apply(frozen, build(at)))))
        for m in (with_penalty, without)
    )
    assert_close(jax.jvp(loss, (floats,), (v,)), jax.jvp(plain, (floats,), (v,)))
    step = [3e-3 * direction for direction in v]
    moved = [[a + sign * b for a, b in zip(floats, step)] for sign in (0.5, -0.5)]
    ends = [jax.grad(loss)(at) for at in moved]
    by_difference = [(a - b) / 3e-3 for a, b in zip(*ends)]
    forward_over_reverse, _, reverse_over_reverse = hessian_products(loss, floats, v)
    for product in (forward_over_reverse, reverse_over_reverse):
        assert_close(product, by_difference, 3e-2)


@pytest.mark.slow
def test_hessians_by_vmap_agree_in_all_four_ways():
    method = METHODS["paca"]
    frozen, (values, *rest), build = trained(method)
    loss = lambda values: jnp.sum(jnp.sin(pj.adapt(forward)(method.apply(frozen, build([values, *rest])))))
    wanted = jax.jacrev(jax.grad(loss))(values)
    for hessian in (jax.hessian(loss), jax.jacrev(jax.jacfwd(loss)), jax.jacfwd(jax.jacfwd(loss))):
        assert_close(hessian(values), wanted, 1e-4)


@pytest.mark.slow
def test_through_scanned_layers_and_checkpoints():
    params = {"layers": {"up": {"kernel": jax.random.normal(KEY, (3, 6, 6)) / 2}}}
    run = pj.adapt(
        lambda p: jax.lax.scan(
            jax.checkpoint(lambda x, layer: (jnp.tanh(x @ layer["up"]["kernel"]), None)), X, p["layers"]
        )[0]
    )
    method = pj.paca(rank=2)
    frozen, trainable = method.init(KEY, params)
    floats, build = floats_of(trainable)
    loss = lambda at: jnp.sum(run(method.apply(frozen, build(at))) ** 2)
    v = along(floats)
    assert_close(jax.jvp(loss, (floats,), (v,))[1], vdot(jax.grad(loss)(floats), v), 1e-4)
    products = list(hessian_products(loss, floats, v))
    assert_close(products[0], products[2], 1e-4)
    assert_close(products[1], products[2], 1e-4)


def test_the_nearest_gradient_of_lora_fa_leaves_the_derivative_of_the_value_alone():
    plain, nearest = pj.lora_fa(rank=2), pj.lora_fa(rank=2, nearest_gradient=True)
    slopes = []
    for method in (plain, nearest):
        frozen, floats, build = trained(method)
        loss = lambda at, m=method, f=frozen, b=build: jnp.sum(jnp.sin(pj.adapt(forward)(m.apply(f, b(at)))))
        slopes.append(jax.jvp(loss, (floats,), (along(floats),)))
    assert_close(*slopes)


@pytest.mark.slow
def test_operations_that_keep_codes_have_the_transpose_of_their_backward_pass():
    x = jax.random.normal(KEY, (4, 64))
    codes = (encode(x, 8, group=32),)
    for f in (
        lambda x: activate(x, jax.nn.silu, GRIDS["silu"], group=32),
        lambda x: recomputed_from_codes(jnp.tanh, (x,), codes),
    ):
        _, pull = jax.vjp(f, x)
        for seed in range(3):
            v, g = (jax.random.normal(jax.random.key(10 * seed + n), x.shape) for n in (0, 1))
            _, slope = jax.jvp(f, (x,), (v,))
            np.testing.assert_allclose(jnp.vdot(g, slope), jnp.vdot(pull(g)[0], v), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_reversible_stack_has_the_derivatives_of_its_layers_one_after_the_other():
    weights = jax.random.normal(KEY, (3, 2, 6, 6)) / 3
    branch = lambda n: lambda _, layer, x: jnp.tanh(x @ layer[n])
    f, g, pair = branch(0), branch(1), (X, X[::-1])

    def stacked(weights):
        return sum(map(jnp.sum, map(jnp.sin, reversible(f, g, pair, (), weights, Coupling(1.0, 1.0, True)))))

    def plain(weights):
        x1, x2 = pair
        for layer in weights:
            y1 = x1 + f((), layer, x2)
            x1, x2 = x2 + g((), layer, y1), y1
        return jnp.sum(jnp.sin(x1)) + jnp.sum(jnp.sin(x2))

    v = jax.random.normal(jax.random.key(5), weights.shape)
    assert_close(jax.jvp(stacked, (weights,), (v,)), jax.jvp(plain, (weights,), (v,)), 1e-4)
    wanted = jax.jvp(jax.grad(plain), (weights,), (v,))[1]
    product = jax.jvp(jax.grad(stacked), (weights,), (v,))[1]
    assert_close(product, wanted, 1e-4)
    assert_close(jax.grad(lambda w: jnp.vdot(jax.grad(stacked)(w), v))(weights), wanted, 1e-4)


def test_a_rule_of_trees_keeps_its_residuals_alone_and_skips_what_does_not_move():
    seen = []

    def backward(kept, g):
        seen.append(jax.tree.structure(kept))
        return {"a": 3.0 * g * kept, "n": None}, None

    cube = with_backward(lambda t, _: t["a"] ** 3, lambda t, _: (t["a"] ** 3, t["a"] ** 2), backward)
    of = lambda a, b: cube({"a": a, "n": jnp.arange(2)}, b)
    assert jax.grad(of)(2.0, 5.0) == 12.0
    assert jax.jvp(lambda a: of(a, a), (2.0,), (1.0,)) == (8.0, 12.0)
    assert jax.grad(of, argnums=1)(2.0, 5.0) == 0.0
    assert jax.grad(jax.grad(of))(2.0, 5.0) == 12.0
    assert len(jax.tree.leaves(jax.vjp(of, 2.0, 5.0)[1])) <= 2
