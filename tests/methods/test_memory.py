"""What the backward pass of an adapted layer keeps, read from the traced program: nothing is compiled.

A kept array is a residual of `jax.vjp` that is no argument of the step (the base, the adapter, the
batch) itself.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from support import KEY, normal, quick_at

import peftjax as pj
from peftjax.planner.residuals import kept_arrays

N, N_IN, N_OUT, RANK = 6, 32, 48, 2
TABLE = 40
PARAMS = {
    "up": {"kernel": jnp.ones((N_IN, N_OUT)), "bias": jnp.ones(N_OUT)},
    "words": {"embedding": jnp.ones((TABLE, N_IN))},
}
X = normal(KEY, (N, N_IN))
TOKENS = jnp.arange(N)


def linear(params, x):
    up = params["up"]
    return x @ up["kernel"].astype(x.dtype) + up["bias"].astype(x.dtype)


def lookup(params, tokens):
    return params["words"]["embedding"][tokens]


def kept(method, forward=linear, x=X, *, params=PARAMS, key=None, through=False, closed=False):
    """`(dtype, shape)` of every kept array; `through`: the layer's input needs a gradient too."""
    frozen, trainable = method.init(KEY, params)
    frozen, trainable = method.close(frozen, trainable) if closed else (frozen, trainable)
    frozen = replace(frozen, advanced=True)
    floating = jnp.issubdtype(x.dtype, jnp.floating)

    def out(trained, frozen, x, key):
        trainable, scale = trained
        h = x * scale if floating else x  # made inside, so that to keep it is to keep an array
        options = {} if key is None else {"key": key}
        return pj.adapt(forward)(method.apply(frozen, trainable, **options), h)

    one = jnp.ones((), x.dtype)
    if through:
        arrays = kept_arrays(out, (trainable, one), frozen, x, key)
    else:
        arrays = kept_arrays(lambda t, *inputs: out((t, one), *inputs), trainable, frozen, x, key)
    return sorted((str(array.dtype), array.shape) for array in arrays)


def make(name, **options):
    info = pj.METHODS[name]
    example = info.conformance.example
    config = {**example, **options}
    if "targets" in info.factory(**example).config and "targets" not in example:
        config["targets"] = ["up"]
    return info.factory(**config)


ON_A_LINEAR_LAYER = [name for name, info in pj.METHODS.items() if name != "rows" and not info.of_blocks]


X_KEPT, THIN, OUT = ("float32", (N, N_IN)), ("float32", (N, RANK)), ("float32", (N, N_OUT))
PER_OUTPUT = [("float32", (1, N_OUT)), ("float32", (N_OUT,))]
SEED = ("key<fry>", ())
NUMBER, SCALARS = ("float32", ()), ("float32", (3,))


@pytest.mark.parametrize("name", quick_at(ON_A_LINEAR_LAYER, every=3))
def test_no_method_keeps_an_array_of_the_weights_size_or_more_than_input_and_output(name):
    shapes = [shape for _, shape in kept(make(name))]
    assert all(shape[-2:] != (N_IN, N_OUT) for shape in shapes)
    assert sum(math.prod(shape) for shape in shapes) <= N * (N_IN + N_OUT + 2 * RANK) + 3 * N_OUT


@pytest.mark.parametrize("name", quick_at(ON_A_LINEAR_LAYER, every=2))
def test_no_method_keeps_a_float32_activation_of_a_bfloat16_layer(name):
    arrays = kept(make(name), x=X.astype(jnp.bfloat16), through=True)
    assert not [shape for dtype, shape in arrays if dtype == "float32" and shape[:1] == (N,)]


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lora", [X_KEPT, THIN]),
        ("rslora", [X_KEPT, THIN]),
        ("lora_plus", [X_KEPT, THIN]),
        ("pissa", [X_KEPT, THIN]),
        ("lowrank_restarts", [X_KEPT, THIN]),
        ("switchlora", [X_KEPT, THIN]),
        ("relora", [X_KEPT, THIN]),
        ("olora", [X_KEPT, THIN]),
        ("lora_fa", [THIN]),
        ("mica", [X_KEPT]),
        ("kasa", [X_KEPT, THIN, ("float32", (RANK, 1)), ("float32", (RANK, N_OUT))]),
        ("velora", [("float32", (N, 4)), ("float32", (8,)), THIN]),
        ("bdlora", [X_KEPT]),
        ("dora", [X_KEPT, THIN, OUT, *PER_OUTPUT]),
        ("vera", [("float32", (N, 4))]),
        ("loha", [X_KEPT]),
        ("hira", [X_KEPT]),
        ("miss", [X_KEPT]),
        ("snell", [X_KEPT, NUMBER]),
        ("snella", [X_KEPT, NUMBER, SCALARS]),
        ("pst", [X_KEPT, NUMBER]),
        ("mask_lora", [X_KEPT]),
        ("scale_lora", [X_KEPT]),
        ("shira", [X_KEPT]),
        ("sara", [X_KEPT]),
        ("full", [X_KEPT]),
        ("bitfit", []),
    ],
)
def test_a_linear_layer_keeps_exactly(name, wanted, through):
    assert kept(make(name), through=through) == sorted(wanted)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("options", [{}, {"ranks": [1, RANK]}])
def test_a_core_between_frozen_projections_keeps_no_input(options, through):
    shapes = kept(make("lamda", **options), through=through)
    assert [array for array in shapes if array[1][0] == N] == [THIN]


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_trained_rows_keep_the_inputs_at_those_rows(in_place, through):
    """And, to pass a gradient on to the layer's input, the numbers of the rows: of no size that grows."""
    numbers = [("int32", (RANK, 1))] if through else []
    assert kept(make("paca", in_place=in_place), through=through, closed=in_place) == [THIN, *numbers]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lora", [X_KEPT, THIN, SEED]),
        ("lora_fa", [THIN]),
        ("velora", [("float32", (N, 4)), ("float32", (8,)), THIN, SEED]),
        ("snell", [X_KEPT, NUMBER, SEED]),
        ("dora", [X_KEPT, THIN, OUT, *PER_OUTPUT, SEED]),
    ],
)
def test_dropout_keeps_a_key_and_no_mask(name, wanted):
    assert kept(make(name, dropout=0.5), key=KEY) == sorted(wanted)


@pytest.mark.parametrize("name", ["snell", "snella"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scan_over_layers_keeps_no_update(name, dtype):
    params = {"up": {"kernel": jnp.ones((3, N_IN, N_OUT), dtype)}}

    def layers(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w)[:, :N_IN], None), x, params["up"]["kernel"])[0]

    shapes = [shape for _, shape in kept(make(name), layers, X.astype(dtype), params=params)]
    assert (3, N, N_IN) in shapes
    assert all(shape[-2:] != (N_IN, N_OUT) for shape in shapes)


SHARING = {
    "vera": {},
    "pvera": {"rank": 5},
    "randlora": {"bases": "stored"},
    "vblora": {"rank": 5, "length": 4, "vectors": 7},
    "mos": {"rank": 5, "stored": 3, "shards": 4, "private": 1},
    "unilora": {"rank": 5, "size": 9},
}


@pytest.mark.parametrize("name", SHARING)
def test_layers_share_what_their_factors_are_made_of_and_hold_none(name):
    params = {"up": {"kernel": jnp.ones((3, N_IN, N_IN))}}

    def layers(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["up"]["kernel"])[0]

    method = make(name, **SHARING[name])
    frozen, trainable = method.init(KEY, params)
    # Neither kept nor made before the loop: nothing with a row of factors or of bases for each layer.
    numbers = [leaf.shape for leaf in jax.tree.leaves((frozen.state, trainable)) if leaf.shape[:1] == (3,)]
    rows = [shape for _, shape in kept(method, layers, params=params, through=True)]
    program = jax.make_jaxpr(lambda t: pj.adapt(layers)(method.apply(frozen, t), X))(trainable)
    made = [v.aval for eqn in program.eqns for v in eqn.outvars]
    rows += [aval.shape for aval in made if jnp.issubdtype(aval.dtype, jnp.floating)]
    for shape in rows:
        activation = shape[-2:] == (N, N_IN) or shape in numbers
        assert activation or shape[:1] != (3,) or shape[-1] not in (N_IN, N_IN * N_IN), shape
    if name in ("vera", "vblora", "mos", "unilora"):
        rank = method.config["rank"]
        assert (3, N, rank) in rows


def test_neighbors_keep_their_common_input_once():
    names = ("query", "key", "value")
    params = {name: {"kernel": jnp.ones((N_IN, N_OUT))} for name in names}

    def three(params, x):
        return [x @ params[name]["kernel"] for name in names]

    method = pj.lora(rank=RANK)
    assert kept(method, three, params=params) == sorted([X_KEPT, *[THIN] * 3])


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (pj.rows([1, 3]), [("int32", (N, 1))]),
        (pj.lora(rank=RANK, targets=["words"]), [("int32", (N, 1)), THIN]),
        (pj.lora_fa(rank=RANK, targets=["words"]), [THIN]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_lookup_keeps_no_row(method, wanted):
    assert kept(method, lookup, TOKENS) == sorted(wanted)


def test_a_convolution_keeps_its_input_and_the_thin_result():
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 6))}}
    images = jnp.ones((2, 5, 5, 4))

    def convolve(params, x):
        return jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    arrays = kept(pj.lora(rank=RANK, targets=["conv"]), convolve, images, params=params)
    activations = [array for array in arrays if array[1][:3] == images.shape[:3]]
    assert activations == [("float32", (2, 5, 5, RANK)), ("float32", images.shape)]
    assert math.prod(max((shape for _, shape in arrays), key=math.prod)) == images.size
