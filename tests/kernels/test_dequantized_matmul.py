"""The product with a coded weight against the dense one, both ways, with its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import KEY, all_but_slow, assert_close, quick_at

from peftjax.core.errors import PeftError
from peftjax.kernels.dequantized_matmul import dequantized_matmul, gpu, reference, tpu
from peftjax.kernels.dequantized_matmul.element import element
from peftjax.planner.flops import count_flops

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
INT4 = tuple(map(float, range(-8, 8)))
COMPLEMENT = (*map(float, range(8)), *map(float, range(-8, 0)))
MXFP4 = (*(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
TABLES = {"nf4": NF4, "int4": INT4, "mxfp4": MXFP4, "int8": None}

# A table, a group, the weight's inputs and outputs, and the rows of x.
ON_GPU = [
    *(("nf4", 16, 208, 37, 1), ("nf4", 64, 320, 70, 7), ("int4", 128, 256, 130, 130)),
    *(("mxfp4", 32, 96, 200, 130), ("int8", 100, 100, 65, 7), ("nf4", 90, 90, 130, 1)),
    ("int8", 16, 48, 64, 130),
]
ON_TPU = [
    *(("nf4", 16, 336, 130, 7), ("nf4", 64, 1344, 300, 1), ("int4", 128, 256, 128, 130)),
    *(("mxfp4", 32, 2144, 200, 7), ("int8", 300, 300, 165, 130), ("nf4", 290, 290, 130, 1)),
    ("int8", 16, 1296, 640, 600),
]
CASES = [
    pytest.param(body, *case, marks=[pytest.mark.slow] * (place > 0))
    for body, cases in ((gpu, ON_GPU), (tpu, ON_TPU))
    for place, case in enumerate(cases)
]


def stored(table, out, width, group, *, shifted=False, dtype=jnp.float32, stack=()):
    """Codes, scales and shifts at random."""
    keys = jax.random.split(KEY, 3)
    if table is None:
        codes = jax.random.randint(keys[0], (*stack, out, width), -127, 128, jnp.int8)
    else:
        codes = jax.random.bits(keys[0], (*stack, out, width // 2), jnp.uint8)
    shape = (*stack, out, width // group)
    scales = jax.random.uniform(keys[1], shape, minval=0.5, maxval=1.5) / (40 if table is None else 1)
    shifts = jax.random.normal(keys[2], shape).astype(dtype) if shifted else None
    return codes, scales.astype(dtype), shifts


def dense(codes, scales, shifts, table, group):
    """The weight `[in, out]` by looking codes up one by one, in numpy."""
    codes, scales = np.asarray(codes), np.asarray(scales, np.float32)
    if table is None:
        elements = codes.astype(np.float32)
    else:
        elements = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
        elements[:, 0::2], elements[:, 1::2] = (np.float32(table)[part] for part in (codes >> 4, codes & 15))
    w = elements * np.repeat(scales, group, 1)
    return jnp.asarray(w if shifts is None else w + np.repeat(np.asarray(shifts, np.float32), group, 1)).T


def array(*shape, dtype=jnp.float32, seed=3):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def factors(lead, rank, out, dtype=jnp.float32):
    return array(*lead, rank, dtype=dtype, seed=4), array(rank, out, dtype=dtype, seed=5)


def exact(x, w, u=None, v=None):
    """The product in float64 of the weight rounded to x's dtype, as numpy."""
    x, w, u, v = (
        None if part is None else np.asarray(part.astype(jnp.float32), np.float64)
        for part in (x, w.astype(x.dtype), u, v)
    )
    return x @ w if u is None else x @ w + u @ v


def assert_product(got, want, dtype):
    assert got.dtype == dtype
    scale = np.abs(want).max()
    limit = scale * (2.0**-8 if dtype == jnp.bfloat16 else 2e-6)
    np.testing.assert_allclose(np.asarray(got.astype(jnp.float32)), want, rtol=0, atol=limit)


@pytest.mark.parametrize("table", [NF4, INT4, COMPLEMENT, MXFP4, np.linspace(-1, 1, 16)])
def test_an_element_is_the_tables(table):
    table = tuple(map(float, np.float32(table)))
    np.testing.assert_array_equal(element(jnp.arange(16), table), table)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "group"), quick_at([("nf4", 64), ("mxfp4", 32), ("int4", 192), ("int8", 16)], 0, 3)
)
@pytest.mark.parametrize("rows", [2**22, 900])
def test_both_products_and_their_gradients(name, group, dtype, rows, monkeypatch):
    """Whole, and in tiles of rows of which some are left over."""
    monkeypatch.setattr(reference, "LARGEST", rows)
    table, out, width = TABLES[name], 37, 192
    codes = stored(table, out, width, group, shifted=name == "int4", dtype=jnp.bfloat16)
    w = dense(*codes, table, group)
    for transposed, plain in ((False, w), (True, w.T)):
        x = array(2, 3, plain.shape[0], dtype=dtype)
        u, v = factors((2, 3), 4, plain.shape[1], dtype)
        g = array(2, 3, plain.shape[1], dtype=dtype, seed=6)
        f = partial(dequantized_matmul, table=table, group=group, transposed=transposed)
        y, pull = jax.vjp(lambda x, u, v, f=f: f(x, *codes, u, v), x, u, v)
        assert_product(y, exact(x, plain, u, v), dtype)
        of_x, of_u, of_v = pull(g)
        assert_product(of_x, exact(g, plain.T), dtype)
        assert_product(of_u, exact(g, v.T), dtype)
        flat = lambda part: part.reshape(6, -1)
        assert_product(of_v, exact(flat(u).T, flat(g)), dtype)
        assert_product(f(x[0, 0], *codes), exact(x[0, 0], plain), dtype)


def test_tiles_of_rows_are_what_a_mesh_has():
    assert reference._tiles(11008, 4096) == (43, 11008)
    assert reference._tiles(128256, 8192) == (334, 128256)
    assert reference._tiles(4096, 1024) == (1, 4096)
    count, whole = reference._tiles(151643, 1024)
    assert whole % count == 0
    assert 0 < 151643 - whole < count


def test_residuals_are_the_codes_and_the_factors():
    codes = stored(NF4, 48, 128, 64)
    x, (u, v) = array(5, 128), factors((5,), 4, 48)
    for given in ((), (u, v)):
        f = lambda x, *given: dequantized_matmul(x, *codes, *given, table=NF4, group=64)
        kept = jax.tree.leaves(jax.vjp(f, x, *given)[1])
        shapes = sorted(leaf.shape for leaf in kept if hasattr(leaf, "shape"))
        assert shapes == sorted(part.shape for part in (*codes[:2], *given))


@pytest.mark.slow
def test_scales_are_constants_and_forward_mode_and_second_derivatives_are_right():
    codes, scales, shifts = stored(NF4, 24, 64, 16, shifted=True)
    w = dense(codes, scales, shifts, NF4, 16)
    x, (u, v) = array(3, 64), factors((3,), 2, 24)
    f = lambda x, s, u, v: dequantized_matmul(x, codes, s, shifts, u, v, table=NF4, group=16)
    of_scales = jax.grad(lambda s: jnp.sum(f(x, s, u, v)))(scales)
    np.testing.assert_array_equal(of_scales, jnp.zeros_like(scales))
    loss = lambda f: lambda x, u, v: jnp.sum(jnp.sin(f(x, u, v)))
    ours, plain = loss(lambda x, u, v: f(x, scales, u, v)), loss(lambda x, u, v: x @ w + u @ v)
    along = lambda f: jax.jvp(jax.grad(f, (0, 1, 2)), (x, u, v), (x, u, v))
    for got, want in zip(jax.tree.leaves(along(ours)), jax.tree.leaves(along(plain)), strict=True):
        assert_close(got, want, 1e-4)


def stack_of_three():
    """A stack of codes and scales, its dense weights, and their product."""
    stack = stored(NF4, 64, 64, 32, stack=(3,))
    ws = jnp.stack([dense(*(None if part is None else part[k] for part in stack), NF4, 32) for k in range(3)])
    product = lambda x, c, s, u=None, v=None: dequantized_matmul(x, c, s, None, u, v, table=NF4, group=32)
    return *stack[:2], ws, product


@pytest.mark.slow
def test_a_stack_is_scanned():
    codes, scales, ws, product = stack_of_three()
    x = array(5, 64) / 8

    def scanned(x):
        return jnp.sum(
            jnp.sin(jax.lax.scan(lambda x, c: (jnp.tanh(product(x, *c)), None), x, (codes, scales))[0])
        )

    def plain(x):
        return jnp.sum(jnp.sin(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]))

    for got, want in zip(jax.jit(jax.value_and_grad(scanned))(x), jax.value_and_grad(plain)(x), strict=True):
        assert_close(got, want, 1e-4)


@pytest.mark.slow
def test_a_stack_and_inputs_are_mapped():
    codes, scales, ws, product = stack_of_three()
    x = array(5, 64)
    each = array(3, 5, 64, seed=7)
    u, v = array(3, 5, 2, seed=8), array(3, 2, 64, seed=9)
    assert_close(jax.vmap(product)(each, codes, scales, u, v), each @ ws + u @ v, 1e-4)
    assert_close(jax.vmap(product, (None, 0, 0))(x, codes, scales), x @ ws, 1e-4)
    one = lambda x, u, v: product(x, codes[0], scales[0], u, v)
    assert_close(jax.vmap(one)(each, u, v), each @ ws[0] + u @ v, 1e-4)
    assert_close(
        jax.vmap(one, (1, None, None), 1)(each, u[0, :3], v[0]),
        each @ ws[0] + (u[0, :3] @ v[0])[:, None],
        1e-4,
    )
    assert_close(jax.vmap(one, (None, 0, 0))(x, u, v), x @ ws[0] + u @ v, 1e-4)
    assert_close(jax.vmap(one, (None, 0, None))(x, u, v[0]), x @ ws[0] + u @ v[0], 1e-4)
    nested = jax.vmap(jax.vmap(product, (0, None, None)), (None, 0, 0))
    assert_close(nested(each, codes, scales), jnp.einsum("bni,lio->lbno", each, ws), 1e-4)
    of_x, of_u, of_v = jax.grad(lambda *p: jnp.sum(jnp.sin(jax.vmap(one)(*p))), (0, 1, 2))(each, u, v)
    dense_of = jax.grad(lambda x, u, v: jnp.sum(jnp.sin(x @ ws[0] + u @ v)), (0, 1, 2))(each, u, v)
    for got, want in zip((of_x, of_u, of_v), dense_of, strict=True):
        assert_close(got, want, 1e-4)


def test_mapped_inputs_do_not_repeat_the_codes():
    codes, scales, _ = stored(NF4, 64, 64, 32)
    f = jax.vmap(lambda x: dequantized_matmul(x, codes, scales, table=NF4, group=32))
    text = str(jax.make_jaxpr(f)(array(7, 5, 64)))
    assert "u8[64,32]" in text
    assert "u8[7,64,32]" not in text


def test_sharded_outputs_and_rows(monkeypatch):
    monkeypatch.setattr(reference, "LARGEST", 2**11)
    codes, scales, _ = stored(NF4, 64, 128, 32)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    x = array(4, 3, 128)
    f = jax.jit(jax.grad(lambda x, c, s: jnp.sum(jnp.sin(dequantized_matmul(x, c, s, table=NF4, group=32)))))
    over = lambda array, *spec: jax.device_put(array, jax.NamedSharding(mesh, P(*spec)))
    assert_close(f(over(x, "x"), over(codes, "y"), over(scales, "y")), f(x, codes, scales), 1e-4)


@pytest.mark.parametrize(
    ("weight", "out"),
    [(("y",), "y"), pytest.param((None, "y"), None, marks=pytest.mark.slow), (("x",), None)],
)
def test_explicit_axes_have_the_types_of_a_dense_product(weight, out, monkeypatch):
    """Outputs, inputs, or the axis of the rows itself; gradients are sharded as what they are of."""
    monkeypatch.setattr(reference, "LARGEST", 2**11)
    codes, scales, _ = stored(NF4, 64, 128, 32)
    x, (u, v) = array(4, 3, 128), factors((4, 3), 4, 64)
    f = lambda x, u, v, c, s: dequantized_matmul(x, c, s, None, u, v, table=NF4, group=32)
    loss = lambda *p: (jnp.sum(jnp.sin(y := f(*p))), y)
    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    want, plain = step(x, u, v, codes, scales)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        over = lambda array, *spec: jax.device_put(array, jax.NamedSharding(mesh, P(*spec)))
        given = over(x, "x"), over(u, "x"), over(v, None, *weight[:1])
        found, y = step(*given, over(codes, *weight), over(scales, *weight))
        assert jax.typeof(y).sharding.spec == P("x", None, out)
        assert_close(y, plain, 1e-4)
        for got, like, value in zip(found, given, want, strict=True):
            assert jax.typeof(got) == jax.typeof(like)
            assert_close(got, value, 1e-4)


def test_inside_a_shard_map_and_the_gradient_of_what_is_shared():
    codes, scales, _ = stored(NF4, 32, 64, 32)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    x, (u, v) = array(8, 64), factors((8,), 2, 32)
    f = lambda x, u, v: dequantized_matmul(x, codes, scales, None, u, v, table=NF4, group=32)
    local = jax.shard_map(f, mesh=mesh, in_specs=(P("x"), P("x"), P()), out_specs=P("x"))
    gradient = lambda f: jax.jit(jax.grad(lambda *p: jnp.sum(jnp.sin(f(*p))), (0, 1, 2)))(x, u, v)
    for got, want in zip(gradient(local), gradient(f), strict=True):
        assert_close(got, want, 1e-4)


def test_what_does_not_fit_is_an_error():
    codes, scales, _ = stored(NF4, 8, 64, 32)
    x, (u, v) = array(2, 64), factors((2,), 2, 8)
    call = lambda *given, table=NF4, group=32: dequantized_matmul(*given, table=table, group=group)
    for wrong, message in (
        (lambda: call(x, codes.astype(jnp.int8), scales), "codes are int8"),
        (lambda: call(x, codes, scales, table=None), "codes are uint8"),
        (lambda: call(x, codes, scales, table=NF4[:8]), "8 elements"),
        (lambda: call(x, codes, scales, group=48), "group is 48 of 64"),
        (lambda: call(x, codes, scales, group=16), "scales is"),
        (lambda: call(x[:, :32], codes, scales), "x is"),
        (lambda: call(x.astype(jnp.int32), codes, scales), "x is int32"),
        (lambda: call(x, codes, scales, None, u), "give both or neither"),
        (lambda: call(x, codes, scales, None, u, v[:, :4]), "v is"),
    ):
        with pytest.raises(PeftError, match=message):
            wrong()


def test_only_tiles_of_a_large_weight_are_dense_on_a_cpu():
    """Of 256 MiB in float32, one tile forward and one backward, to which XLA gives different places."""
    side = 8192
    operands = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((4, side), "float32"),
            ((side, side // 2), "uint8"),
            ((side, side // 64), "float32"),
        )
    ]
    loss = lambda x, c, s: jnp.sum(jnp.sin(dequantized_matmul(x, c, s, table=NF4, group=64)))
    program = jax.jit(jax.grad(loss)).lower(*operands).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * reference.LARGEST + 2**21


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("body", "name", "group", "width", "out", "n"), CASES)
def test_kernels_interpreted(body, name, group, width, out, n, dtype):
    """Both products; with shifts where the table is int4 or int8, with a low-rank branch but for 7 rows."""
    table = TABLES[name]
    codes = stored(table, out, width, group, shifted=name in ("int4", "int8"))
    w = dense(*codes, table, group)
    for transposed, plain in ((False, w), (True, w.T)):
        x = array(n, plain.shape[0], dtype=dtype)
        u, v = (None, None) if n == 7 else factors((n,), 4, plain.shape[1], dtype)
        y = body.matmul(x, *codes, u, v, table=table, group=group, transposed=transposed, interpret=True)
        assert_product(y, exact(x, plain, u, v), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("body", [gpu, tpu])
def test_kernels_interpreted_on_a_stack_with_more_axes(body):
    codes, scales, _ = stored(NF4, 128, 256, 64, stack=(2,), dtype=jnp.bfloat16)
    x, u, v = array(2, 3, 5, 256), array(2, 3, 5, 4), array(2, 4, 128)
    static = {"table": NF4, "group": 64, "transposed": False}
    y = body.matmul(x, codes, scales, None, u, v, **static, interpret=True)
    assert_close(y, reference.matmul(x, codes, scales, None, u, v, **static), 1e-5)


@pytest.mark.parametrize(
    ("body", "group", "width", "out"),
    [(gpu, 48, 192, 128), (gpu, 8, 256, 128), (tpu, 8, 256, 128), (tpu, 64, 256, 120), (tpu, 64, 192, 128)],
)
def test_what_fits_no_kernel_takes_the_reference(body, group, width, out):
    codes, scales, _ = stored(NF4, out, width, group)
    static = {"table": NF4, "group": group, "transposed": False}
    f = lambda body: jax.make_jaxpr(lambda x: body.matmul(x, codes, scales, None, None, None, **static))
    assert "pallas_call" not in str(f(body)(array(4, width)))
    codes, scales, _ = stored(NF4, 128, 256, 64)
    static["group"] = 64
    assert "pallas_call" in str(f(body)(array(4, 256)))
    assert "pallas_call" not in str(f(body)(array(0, 256)))


@pytest.mark.parametrize("platform", all_but_slow(["cpu", "tpu", "cuda"], ["cpu"]))
def test_flops_are_the_products(platform, monkeypatch):
    monkeypatch.setattr(reference, "LARGEST", 2**12)
    codes, scales, _ = stored(NF4, 128, 256, 64, stack=(2,))
    f = jax.vmap(lambda x, c, s, u, v: dequantized_matmul(x, c, s, None, u, v, table=NF4, group=64))
    operands = array(2, 16, 256), codes, scales, array(2, 16, 3), array(2, 3, 128)
    assert count_flops(jax.make_jaxpr(f)(*operands), platform).total == 2 * 2 * 16 * 128 * (256 + 3)
