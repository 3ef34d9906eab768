"""Each equation that can meet a structured weight: same outputs and gradients as the dense array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import KEY, assert_close, combined, normal, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.weights.base import dense
from peftjax.weights.column_normalized import ColumnNormalized, column_squares
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank

D, E = 8, 3
X = normal(KEY, (4, D))


def low_rank(letters, shape, name="layer/kernel"):
    layout = Layout.parse(letters, shape, name)
    random = np.random.default_rng(0)
    base, a, b = (
        jnp.array(0.3 * random.standard_normal(size), jnp.float32)
        for size in (shape, *((*layout.stack, 3, n) for n in layout.matrix))
    )
    return LowRank(base, a, b, layout, 0.5)


def scaled(letters, shape):
    weight = low_rank(letters, shape)
    squares = column_squares(weight.base, weight.layout)
    return ColumnNormalized(weight, 1.5 * jnp.sqrt(squares), squares, weight.layout)


@jax.custom_vjp
def triple_gradient(w, x):
    return x @ w


triple_gradient.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, 3.0 * (g @ r[0].T)))


@jax.custom_jvp
def double_tangent(w, x):
    return x @ w


@double_tangent.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return double_tangent(w, x), 2.0 * dx @ w + x @ dw


def sharded(w, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    product = jax.shard_map(
        lambda x, w: lax.psum(x @ w, "d"), mesh=mesh, in_specs=(P(None, "d"), P("d", None)), out_specs=P()
    )
    return product(x, w)


MATRIX = {
    "matmul": lambda w, x: x @ w,
    "transposed": lambda w, x: x @ w.T,
    "weight first": lambda w, x: jnp.einsum("bd,ed->eb", x, w),
    "reshaped": lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(D, 2, D // 2)),
    "reshaped the other way": lambda w, x: jnp.einsum(
        "bd,hkd->bhk", x, lax.reshape(w, (2, D // 2, D), (1, 0))
    ),
    "sliced outputs": lambda w, x: x @ w[:, 2:6],
    "flipped": lambda w, x: x @ w[::-1, ::-1],
    "sliced inputs": lambda w, x: x[:, :3] @ w[:3],
    "outputs cut in two": lambda w, x: sum(x @ part for part in jnp.split(w, 2, axis=1)),
    "interleaved outputs": lambda w, x: x @ w[:, 1::2],
    "interleaved inputs": lambda w, x: x[:, ::2] @ w[::2],
    "jit": lambda w, x: jax.jit(lambda x, w: x @ w)(x, w),
    "remat": lambda w, x: jax.checkpoint(
        lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable
    )(x, w),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: x, w, x),
    "custom_vjp": triple_gradient,
    "custom_jvp": double_tangent,
    "shard_map": sharded,
    "lookup": lambda w, x: w[jnp.array([[1, 2], [0, 3]])],
    "lookup by take": lambda w, x: jnp.take(w, jnp.array([1, 7]), axis=0),
    "tied": lambda w, x: w[jnp.array([1, 2])] @ w.T,
    "grad inside": lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x),
    "vmap inside": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "weight returned": lambda w, x: (x @ w, w)[0],
    "optimization barrier": lambda w, x: x @ lax.optimization_barrier(w),
}
STACKED = {
    "scan": lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0],
    "scan of remat": lambda w, x: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, w)[0],
    "scan that returns weights": lambda w, x: x @ lax.scan(lambda c, w: (c @ w, w), x, w)[1][1],
    "index": lambda w, x: x @ w[1],
    "loop": lambda w, x: sum(x @ w[n] for n in range(E)),
    "iteration": lambda w, x: sum(x @ each for each in w),
    "traced index": lambda w, x: lax.scan(lambda c, n: (jnp.tanh(c @ w[n]), None), x, jnp.arange(E))[0],
    "vmap over experts": lambda w, x: jax.vmap(lambda w: x @ w)(w),
    "einsum over experts": lambda w, x: jnp.einsum("td,edf->tef", x, w),
    "batched by expert": lambda w, x: jnp.einsum("etd,edf->etf", jnp.stack([x, 2 * x, 3 * x]), w),
    "expert per token": lambda w, x: jnp.einsum("td,tdf->tf", x, w[jnp.array([0, 1, 2, 1])]),
    "slice of the stack": lambda w, x: jnp.einsum("td,edf->tef", x, w[1:]),
    "ragged": lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 2, 1])),
}


def check(fn, weight, x):
    def adapted(weight, x):
        out = pj.adapt(fn)(weight, x)
        return jnp.sum(jnp.sin(out)), out

    def dense(weight, x):
        out = fn(weight.dense(), x)
        return jnp.sum(jnp.sin(out)), out

    got = jax.jit(jax.value_and_grad(adapted, (0, 1), has_aux=True))(weight, x)
    want = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(weight, x)
    assert_close(got[0][1], want[0][1])
    assert_close(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]))


@pytest.mark.parametrize("name", quick_at(MATRIX, every=2))
def test_matrix(name):
    check(MATRIX[name], low_rank("io", (D, D)), X)


@pytest.mark.parametrize("name", quick_at(STACKED, every=2))
def test_stack(name):
    check(STACKED[name], low_rank("sio", (E, D, D)), X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matmul", "transposed", "tied", "lookup", "sliced outputs", "shard_map"])
def test_rescaled_columns(name):
    def dense_with_fixed_lengths(weight, x):
        return MATRIX[name](weight.dense(), x)

    weight = scaled("io", (D, D))
    assert_close(pj.adapt(MATRIX[name])(weight, X), dense_with_fixed_lengths(weight, X))


def test_while_and_vmap_outside():
    weight = low_rank("sio", (E, D, D))

    def loop(w, x):
        return lax.fori_loop(0, E, lambda n, c: jnp.tanh(c @ w[n]), x)

    assert_close(pj.adapt(loop)(weight, X), loop(weight.dense(), X))
    rows = jax.vmap(lambda x: pj.adapt(loop)(weight, x[None])[0])(X)
    assert_close(rows, loop(weight.dense(), X))


CONVOLUTIONS = {
    "iiio": ("NHWC", "HWIO", "NHWC"),
    "oiii": ("NCHW", "OIHW", "NCHW"),
    "iio": ("NWC", "WIO", "NWC"),
}


@pytest.mark.parametrize(("letters", "groups"), combined(CONVOLUTIONS, [2, 1]))
def test_convolution(letters, groups):
    numbers = CONVOLUTIONS[letters]
    window = letters.count("i") - 1
    sizes = {"N": 2, "C": 4, "O": 6, "I": 4 // groups}
    x = jax.random.normal(KEY, tuple(sizes.get(axis, 8) for axis in numbers[0]))
    weight = low_rank(letters, tuple(sizes.get(axis, 3) for axis in numbers[1]))

    def conv(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            (2,) * window,
            [(1, 2)] * window,
            rhs_dilation=(2,) * window,
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    check(conv, weight, x)


def test_volume_convolution_and_transposed():
    weight = low_rank("iiiio", (2, 2, 2, 3, 5))
    x = jax.random.normal(KEY, (1, 4, 4, 4, 3))
    check(
        lambda w, x: lax.conv_transpose(
            x, w, (2, 2, 2), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        ),
        weight,
        x,
    )


def test_bfloat16_weights_and_activations():
    # bfloat16 keeps 8 bits: the base's rounded product and the adapter's are added after rounding.
    weight, x = low_rank("io", (D, D)), X

    def fn(w, x):
        return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

    out = pj.adapt(fn)(weight, x)
    assert out.dtype == jnp.bfloat16
    assert_close(out, x @ weight.dense(), 2e-2)


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("reduce_sum", lambda w, x: x * jnp.sum(w)),
        ("mul", lambda w, x: x @ (w * w)),
        ("pad", lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 1)))),
    ],
)
def test_a_dense_use_is_an_error_that_names_everything(name, fn):
    weight = low_rank("io", (D, D), "blocks/query/kernel")
    with pytest.raises(PeftError) as caught:
        pj.adapt(fn)(weight, X)
    text = str(caught.value)
    assert all(
        part in text for part in ("blocks/query/kernel", repr(name), "test_adapt_primitives.py:", "layouts")
    )
    assert_close(pj.adapt(fn, allow_dense=[name])(weight, X), fn(weight.dense(), X))
    assert_close(pj.adapt(fn, allow_dense=["blocks/.*"])(weight, X), fn(weight.dense(), X))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w: jnp.where(X[0, 0] > 0, w, 0.0),
        lambda w: jnp.pad(w, ((0, 0), (0, 1))),
        lambda w: jnp.take(w, jnp.array([1]), axis=0, mode="wrap").sum() + jnp.linalg.norm(w),
        lambda w: jnp.sort(w, 0),
        lambda w: jax.jit(jax.checkpoint(jnp.linalg.norm))(w),
    ],
    ids=["where", "pad", "norm", "sort", "nested"],
)
def test_a_dense_use_within_a_function_of_jax_names_the_line_that_called_it(fn):
    with pytest.raises(PeftError, match=rf"test_adapt_primitives.py:{fn.__code__.co_firstlineno} "):
        pj.adapt(fn)(low_rank("io", (D, D)))


def test_named_scopes_are_kept_in_the_order_in_which_they_lie():
    def model(w, x):
        with jax.named_scope("outer"):
            block = jax.jit(jax.named_scope("inner")(jnp.matmul))
            return lax.scan(lambda c, _: (block(c, w), None), x, length=2)

    text = jax.jit(pj.adapt(model)).lower(low_rank("io", (D, D)), X).as_text(debug_info=True)
    assert "outer" in text
    assert "inner" in text


TIMES = {
    "number": lambda w, s, x: x @ (w * 0.5),
    "transposed": lambda w, s, x: x @ (s * w).T,
    "divided": lambda w, s, x: x @ (-w / s),
    "lookup": lambda w, s, x: (2 * w)[jnp.array([1, 3])],
    "scan": lambda w, s, x: lax.scan(lambda c, _: (jnp.tanh(c @ (w * s)), None), x, length=2)[0],
}


@pytest.mark.parametrize(("make", "name"), combined([low_rank, scaled], TIMES))
def test_a_number_times_a_weight_is_a_weight(make, name):
    weight, s, fn = make("io", (D, D)), jnp.float32(0.7), TIMES[name]

    def losses(run, value):
        return jax.value_and_grad(lambda w, s: jnp.sum(jnp.sin(run(w, s, X))), (0, 1))(value, s)

    got, (of_parts, of_s) = losses(pj.adapt(fn), weight)
    want, (whole, wanted_s) = losses(fn, weight.dense())
    parts = jax.vjp(lambda w: w.dense(), weight)[1](whole)[0]
    assert_close([got, of_s], [want, wanted_s], 1e-4)
    inner, wanted = (w.base if make is scaled else w for w in (of_parts, parts))
    assert_close([inner.a, inner.b], [wanted.a, wanted.b], 1e-4)


@pytest.mark.slow
def test_the_experts_of_a_scaled_stack_are_scaled():
    weight, x = low_rank("sio", (E, D, D)), jnp.ones((E, 4, D))
    for fn in (
        lambda w: jnp.einsum("etd,edf->etf", x, 0.5 * w),
        lambda w: jnp.einsum("td,edf->tef", X, -w),
        lambda w: lax.ragged_dot(X, w / 4.0, jnp.array([1, 2, 1])),
        lambda w: X @ (w * 3.0)[1],
    ):
        assert_close(pj.adapt(fn)(weight), fn(weight.dense()), 1e-4)


def chosen(p):
    return lax.cond(X[0, 0] > 0, lambda: p["a"], lambda: p["b"])


def exchanged(p):
    return lax.fori_loop(0, 2, lambda n, w: p["b"], p["a"])


def exchanged_in_a_while(p):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, p["b"]), (0, p["a"]))[1]


CHOICES = [chosen, exchanged, exchanged_in_a_while]


@pytest.mark.parametrize("choose", CHOICES)
def test_one_of_two_weights_of_one_structure_is_a_weight(choose):
    pair = {"a": low_rank("io", (D, D), "a"), "b": low_rank("io", (D, D), "b")}
    pair["b"] = pair["b"].elementwise(lambda part: part + 1.0)
    want = X @ choose(jax.tree.map(dense, pair, is_leaf=lambda n: isinstance(n, LowRank)))
    assert_close(pj.adapt(lambda p: X @ choose(p))(pair), want)


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("other", [jnp.eye(D), scaled("io", (D, D)), low_rank("oi", (D, D))], ids=type)
def test_one_of_two_weights_of_other_structures_is_an_error_that_names_one(choose, other):
    pair = {"a": low_rank("io", (D, D), "a"), "b": other}
    with pytest.raises(
        PeftError, match=r"^(a|layer/kernel): '(cond|scan|while)' at .* needs the dense array"
    ):
        pj.adapt(lambda p: X @ choose(p))(pair)
    want = X @ choose(jax.tree.map(dense, pair, is_leaf=lambda n: isinstance(n, LowRank | ColumnNormalized)))
    assert_close(pj.adapt(lambda p: X @ choose(p), allow_dense=["cond", "scan", "while"])(pair), want)


def test_wrong_axes_are_an_error_and_never_a_wrong_result():
    weight = low_rank("sio", (D, 2, 4))  # used as [in, heads, size]
    with pytest.raises(PeftError, match=r"'dot_general'.*axes 'sio'"):
        pj.adapt(lambda w, x: jnp.einsum("bd,dhk->bhk", x, w))(weight, X)


def test_remat_policy_is_kept():
    weight = low_rank("io", (D, D))

    def residuals(policy):
        fn = jax.checkpoint(lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w)), policy=policy)
        _, pull = jax.vjp(lambda x: pj.adapt(fn)(weight, x), X)
        return sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.shape == (4, D))

    everything = residuals(jax.checkpoint_policies.everything_saveable)
    nothing = residuals(jax.checkpoint_policies.nothing_saveable)
    assert nothing == X.size < everything


def test_functions_without_structured_weights_run_as_they_are():
    def fn(w, x, flag, *, name):
        return (x @ w, flag, name)

    w = jnp.eye(D)
    out = pj.adapt(fn)(w, X, True, name="n")
    assert out[1:] == (True, "n")
    out = pj.adapt(fn)(low_rank("io", (D, D)), X, True, name="n")
    assert out[1:] == (True, "n")
