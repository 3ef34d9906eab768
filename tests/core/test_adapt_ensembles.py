"""Ensembles by `vmap` inside the adapted function, and grouped convolutions differentiated there."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_close, assert_equals_merged, assert_no_dense_gradient, noisy, normal, quick_at

import peftjax as pj

E = 3
SERIES = normal(KEY, (2, 6, 8))
STACKED = jnp.stack([SERIES, -SERIES, 2 * SERIES])
IDS = jnp.array([[[0, 9], [3, 4]], [[5, 1], [2, 0]], [[9, 8], [7, 7]]])
KERNELS, GROUPED = normal(KEY, (E, 3, 8, 10)), normal(KEY, (E, 3, 4, 10))
TABLES = normal(KEY, (E, 10, 6))


def conv(x, w, groups=1):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, w, (2,), [(1, 1)], dimension_numbers=numbers, feature_group_count=groups
    )


def in_groups(x, w):
    return conv(x, w, 2)


def gradient(x, w):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(in_groups(x, w))))(x)


CONVOLUTIONS = {
    "same input": (KERNELS, lambda w, x: jax.vmap(conv, (None, 0))(x, w), SERIES),
    "own inputs": (KERNELS, lambda w, x: jax.vmap(conv)(x, w), STACKED),
    "groups, same input": (GROUPED, lambda w, x: jax.vmap(in_groups, (None, 0))(x, w), SERIES),
    "groups, own inputs": (GROUPED, lambda w, x: jax.vmap(in_groups)(x, w), STACKED),
    "results apart": (KERNELS, lambda w, x: jax.vmap(conv, (None, 0), -1)(x, w), SERIES),
    "gradient in groups": (GROUPED[0], lambda w, x: gradient(x, w), SERIES),
    "gradients of an ensemble": (GROUPED, lambda w, x: jax.vmap(gradient)(x, w), STACKED),
    "ensembles of ensembles": (
        KERNELS.reshape(E, 1, *KERNELS.shape[1:]).repeat(2, 1),
        lambda w, x: jax.vmap(jax.vmap(conv, (None, 0)))(x, w),
        STACKED,
    ),
    "in a scan": (
        KERNELS,
        lambda w, x: lax.scan(lambda c, _: (c + jax.vmap(conv, (None, 0))(x, w).sum(), None), 0.0, length=2)[
            0
        ],
        SERIES,
    ),
}


@pytest.mark.parametrize("name", quick_at(CONVOLUTIONS, every=3))
def test_convolutions(name):
    w, use, x = CONVOLUTIONS[name]
    letters = "s" * (w.ndim - 3) + "iio"
    method = pj.lora(rank=2, targets=".*", layouts={"kernel": letters})
    assert_equals_merged(lambda p, x: use(p["kernel"], x), {"kernel": w}, method, x, tolerance=1e-4)
    assert_no_dense_gradient(lambda p, x: use(p["kernel"], x), {"kernel": w}, method, x)


LOOKUPS = {
    "same rows": lambda t: jax.vmap(lambda t: t[IDS[0]])(t),
    "own rows": lambda t: jax.vmap(lambda t, ids: t[ids])(t, IDS),
    "own rows, filled": lambda t: jax.vmap(
        lambda t, ids: jnp.take(t, ids + 5, 0, mode="fill", fill_value=2.0)
    )(t, IDS),
    "columns": lambda t: jax.vmap(lambda t, ids: t[:, ids], (0, 0), 1)(t, IDS % 6),
    "one row each": lambda t: jax.vmap(lambda t, n: t[n])(t, IDS[:, 0, 0]),
    "scalars": lambda t: jax.vmap(lambda t, ids: jax.vmap(lambda n: t[n])(ids))(t, IDS[:, 0]),
    "equinox": lambda t: eqx.filter_vmap(
        lambda t, ids: jax.vmap(eqx.nn.Embedding(weight=t))(ids), in_axes=(0, None)
    )(t, IDS[0, 0]),
}


@pytest.mark.parametrize("name", quick_at(LOOKUPS, every=3))
def test_lookups(name):
    method = pj.lora(rank=2, targets=".*", layouts={"t": "sio"})
    assert_equals_merged(lambda p: LOOKUPS[name](p["t"]), {"t": TABLES}, method)
    assert_no_dense_gradient(lambda p: LOOKUPS[name](p["t"]), {"t": TABLES}, method)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own inputs", "groups, same input", "gradient in groups"])
@pytest.mark.parametrize("method", [pj.dora, pj.paca, pj.snell])
def test_convolutions_of_other_methods(method, name):
    w, use, x = CONVOLUTIONS[name]
    method = method(rank=2, targets=".*", layouts={"kernel": "s" * (w.ndim - 3) + "iio"})
    frozen, trainable = method.init(KEY, {"kernel": w})
    trainable = noisy(trainable)
    got = pj.adapt(use)(method.apply(frozen, trainable)["kernel"], x)
    assert_close(got, use(method.merge(frozen, trainable)["kernel"], x), 1e-4)


@pytest.mark.parametrize(("inner", "letters"), [("conv", "siio"), ("embed", "sio")])
def test_flax(inner, letters):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(5, (3,))(x) if inner == "conv" else nn.Embed(10, 5)(jnp.argmax(x, -1))

    options = {
        "in_axes": None,
        "axis_size": E,
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True},
    }
    module = nn.vmap(Model, **options)()
    params = module.init(KEY, SERIES)["params"]
    method = pj.lora(rank=2, targets=".*(kernel|embedding)", layouts={"(kernel|embedding)": letters})
    assert_equals_merged(lambda p: module.apply({"params": p}, SERIES), params, method)


def test_what_mixes_features_with_a_stack_is_still_an_error():
    method = pj.lora(rank=2, targets=".*", layouts={"t": "sio"})
    weights = method.apply(*method.init(KEY, {"t": TABLES}))
    with pytest.raises(pj.PeftError, match="needs the dense array"):
        pj.adapt(lambda p: p["t"].reshape(E * 10 * 6) ** 2)(weights)
