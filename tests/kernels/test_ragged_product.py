"""The products of rows with the matrices of their groups, in tiles, against `jax.lax.ragged_dot`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernels.targets import compiled, shape
from support import KEY, assert_close, normal, quick_at

import peftjax as pj
from peftjax.kernels.ragged_product import ragged_outer, ragged_product
from peftjax.kernels.ragged_product.tiled import tile_rows
from peftjax.planner.flops import count_flops

SIZES = {
    "some rows left over": (9, [2, 0, 4]),
    "tiles of several groups": (500, [3, 200, 0, 130, 64, 64, 39]),
    "fewer rows than groups": (3, [0, 1, 0, 0, 1, 0, 1, 0]),
    "one group has all": (200, [0, 200, 0]),
    "nothing": (5, [0, 0]),
}


def operands(rows, sizes, dtype=jnp.float32):
    x, w = normal(KEY, (rows, 8), dtype), normal(jax.random.key(1), (len(sizes), 8, 6), dtype)
    return x, w, jnp.asarray(sizes), normal(jax.random.key(2), (rows, 6), dtype)


@pytest.mark.parametrize("name", quick_at(SIZES, every=2))
def test_values_and_gradients_of_both(name):
    x, w, sizes, g = operands(*SIZES[name])

    def all_of(product):
        def run(x, w, g):
            y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
            return y, pull(g), jax.jvp(lambda x: jnp.sin(product(x, w, sizes)), (x,), (x + 1,))[1]

        return run

    def back(x, w, sizes):
        return ragged_product(x, w.swapaxes(1, 2), sizes, transposed=True)

    found, transposed, wanted = jax.jit(
        lambda *args: [all_of(f)(*args) for f in (ragged_product, back, lax.ragged_dot)]
    )(x, w, g)
    assert_close(found, wanted, 1e-6)
    assert_close(transposed, wanted, 1e-6)


@pytest.mark.slow
def test_second_derivatives_and_mapped_axes():
    """The second of `jax.lax.ragged_dot` are not implemented."""
    x, w, sizes, g = operands(70, [30, 0, 33])
    group = np.repeat([0, 2], [30, 33])
    formula = lambda x, w, _: jnp.pad(jnp.einsum("nd,ndf->nf", x[:63], w[group]), ((0, 7), (0, 0)))
    energy = lambda product: lambda x, w: jnp.sum(jnp.tanh(product(x, w, sizes)) * g)

    def second(product):
        gradient = jax.grad(energy(product), (0, 1))
        norm = lambda x, w: sum(jnp.sum(jnp.square(one)) for one in gradient(x, w))
        return jax.grad(norm, (0, 1))(x, w)

    assert_close(*jax.jit(lambda: (second(ragged_product), second(formula)))(), 1e-5)
    several = jnp.stack([sizes, sizes[::-1]])
    mapped = jax.jit(jax.vmap(ragged_product, (None, None, 0)))(x, w, several)
    for one, own in zip(mapped, several, strict=True):
        assert_close(one, lax.ragged_dot(x, w, own), 1e-6)


def test_sums_in_bfloat16_are_those_of_the_products_of_all_rows():
    x, w, sizes, g = operands(900, [450, 450], jnp.bfloat16)
    assert tile_rows(900, 2) < 450
    found = jax.jit(lambda: (ragged_product(x, w, sizes), ragged_outer(x, g, sizes)))()
    exact = [part.astype(jnp.float32) for part in (x, w, g)]
    wanted = lax.ragged_dot(*exact[:2], sizes), ragged_outer(exact[0], exact[2], sizes)
    assert [one.dtype for one in found] == [jnp.bfloat16] * 2
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=float(jnp.abs(other).max()) / 128)


def test_rows_of_several_devices_in_a_shard_map():
    """The matrices are all devices', and their gradient is summed over them."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, _, g = operands(140, [1, 1, 1])
    sizes = jnp.array([[30, 0, 40], [10, 58, 0]])

    def own(w, x, g, sizes):
        return jax.lax.psum(jnp.sum(jnp.tanh(ragged_product(x, w, sizes[0])) * g), "x")

    each, all_of = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    found = jax.shard_map(own, mesh=mesh, in_specs=(all_of, each, each, each), out_specs=all_of)

    def wanted(w, x, g, sizes):
        parts = zip(jnp.split(x, 2), jnp.split(g, 2), sizes)
        return sum(jnp.sum(jnp.tanh(lax.ragged_dot(x, w, own)) * g) for x, g, own in parts)

    both = lambda *args: [jax.value_and_grad(f, (0, 1))(*args) for f in (found, wanted)]
    assert_close(*jax.jit(both)(w, x, g, sizes), 1e-5)


@pytest.mark.slow
def test_it_is_one_equation_that_structured_weights_answer():
    x, w, sizes, _ = operands(9, [2, 0, 4])
    method = pj.lora(rank=2, targets=".*", layouts={"w": "sio"})
    frozen, trainable = method.init(KEY, {"w": w})
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    for transposed in (False, True):
        inputs = x if not transposed else x[:, :6]
        use = lambda params, t=transposed, x=inputs: ragged_product(x, params["w"], sizes, transposed=t)
        assert [eqn.primitive.name for eqn in jax.make_jaxpr(use)({"w": w}).eqns] == ["ragged_product"]
        found = pj.adapt(use)(method.apply(frozen, trainable))
        assert_close(found, use(method.merge(frozen, trainable)), 1e-5)
        assert count_flops(jax.make_jaxpr(use)({"w": w})).total == 2 * 9 * 8 * 6
    thin = jax.make_jaxpr(jax.grad(lambda t: pj.adapt(use)(method.apply(frozen, t)).sum()))(trainable)
    assert w.shape not in {v.aval.shape for eqn in thin.eqns for v in eqn.outvars}


@pytest.mark.parametrize("form", quick_at(["nf4", "mxfp4", "nvfp4"], 1))
def test_of_codes_one_matrix_is_decoded_at_a_time(form):
    """Both ways through weights whose scales are codes too, beside low-rank factors, and mapped over rows."""
    x, w = normal(KEY, (90, 64)), normal(jax.random.key(1), (3, 64, 32))
    sizes, layouts = jnp.array([40, 0, 45]), {"w": "sio"}
    coded = pj.nf4(layouts=layouts, targets=".*") if form == "nf4" else None
    coded = coded or pj.quantized(format=form, layouts=layouts, targets=".*")
    method = pj.chain(coded, pj.lora(rank=2, targets=".*", layouts=layouts))
    frozen, trainable = method.init(KEY, {"w": w})
    dense = method.merge(frozen, trainable)

    def run(params, x):
        forward = pj.adapt(lambda params, x: ragged_product(x, params["w"], sizes))
        y, pull = jax.vjp(lambda x: forward(params, x), x)
        return y, pull(jnp.sin(y)), jax.vmap(forward, (None, 0))(params, jnp.stack([x, -x]))

    assert_close(jax.jit(run)(method.apply(frozen, trainable), x), jax.jit(run)(dense, x), 1e-5)
    program = jax.jit(lambda params, x: run(params, x)[1]).lower(method.apply(frozen, trainable), x)
    assert not re.search(r"f32\[3,(64,32|32,64)\]", program.compile().as_text())


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_compiled_for_an_accelerator_it_copies_nothing_for_each_group(platform):
    rows, groups, width, out = 4096, 32, 1024, 512

    def step(x, w, sizes):
        return jax.value_and_grad(lambda x, w: jnp.sum(ragged_product(x, w, sizes) ** 2), (0, 1))(x, w)

    dtypes = {"dtype": jnp.bfloat16}
    types = shape(rows, width, **dtypes), shape(groups, width, out, **dtypes), shape(groups, dtype=jnp.int32)
    program = compiled(step, types, platform)
    assert largest_float(program) <= groups * width * out


@pytest.mark.slow
def test_compiled_for_a_gpu_no_more_than_a_matrix_of_codes_is_dense():
    rows, groups, width, out = 4096, 32, 1024, 512
    codes = pj.quantized(format="mxfp4", layouts={"w": "sio"}, targets=".*")
    coded = jax.eval_shape(codes.init, KEY, {"w": shape(groups, width, out, dtype=jnp.bfloat16)})[0].params

    def step(params, x, sizes):
        forward = pj.adapt(lambda params, x: ragged_product(x, params["w"], sizes))
        return jax.value_and_grad(lambda x: jnp.sum(jnp.square(forward(params, x).astype(jnp.float32))))(x)

    operands = coded, shape(rows, width, dtype=jnp.bfloat16), shape(groups, dtype=jnp.int32)
    assert largest_float(compiled(step, operands, "cuda")) < groups * width * out


def largest_float(program):
    """Elements of the largest floating-point array of a program."""
    found = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in lengths.split(",")])) for lengths in found)
