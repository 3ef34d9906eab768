"""Kernels of convolutions that the model flips, transposes and differentiates: equal to the merged ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_close, assert_equals_merged, assert_no_dense_gradient, noisy, normal, quick_at

import peftjax as pj
from peftjax.core.errors import PeftError

SERIES, IMAGE = normal(KEY, (2, 6, 8)), normal(KEY, (2, 5, 6, 8))


def transposed(x, numbers, **options):
    def forward(p, x):
        return lax.conv_transpose(x, p["kernel"], dimension_numbers=numbers, transpose_kernel=True, **options)

    return forward, x


def gradient(x, numbers, **options):
    def forward(p, x):
        def energy(x):
            y = lax.conv_general_dilated(x, p["kernel"], dimension_numbers=numbers, **options)
            return jnp.sum(jnp.tanh(y))

        return jax.grad(energy)(x)

    return forward, x


USES = {
    "series": (*transposed(SERIES, ("NWC", "WIO", "NWC"), strides=(2,), padding="SAME"), (3, 5, 8), "ioi"),
    "image": (
        *transposed(IMAGE, ("NHWC", "HWIO", "NHWC"), strides=(2, 1), padding="VALID"),
        (3, 2, 5, 8),
        "iioi",
    ),
    "dilated, channels first": (
        *transposed(
            IMAGE.swapaxes(1, 3),
            ("NCHW", "OIHW", "NCHW"),
            strides=(1, 2),
            padding="SAME",
            rhs_dilation=(2, 1),
        ),
        (8, 5, 3, 2),
        "ioii",
    ),
    "read the other way": (
        *transposed(SERIES, ("NWC", "WIO", "NWC"), strides=(2,), padding="SAME"),
        (3, 5, 8),
        "iio",
    ),
    "gradient": (
        *gradient(SERIES, ("NWC", "WIO", "NWC"), window_strides=(2,), padding=[(1, 2)]),
        (3, 8, 5),
        "iio",
    ),
    "gradient of an image": (
        *gradient(
            IMAGE.swapaxes(1, 3),
            ("NCHW", "OIHW", "NCHW"),
            window_strides=(1, 2),
            padding=[(1, 1), (0, 2)],
            lhs_dilation=(2, 1),
            rhs_dilation=(1, 2),
        ),
        (4, 8, 2, 3),
        "oiii",
    ),
}


@pytest.mark.parametrize("name", quick_at(USES, every=3))
def test_a_flipped_kernel_is_that_of_the_merged_model(name):
    forward, x, shape, letters = USES[name]
    params = {"kernel": 0.3 * jax.random.normal(KEY, shape)}
    method = pj.lora(rank=2, targets=".*", layouts={"kernel": letters})
    assert_equals_merged(forward, params, method, x, tolerance=1e-4)
    assert_no_dense_gradient(forward, params, method, x)


METHODS = {
    "dora": functools.partial(pj.dora, rank=2),
    "shira": functools.partial(pj.shira, rank=1),
    "snell": functools.partial(pj.snell, rank=2),
    "paca": functools.partial(pj.paca, rank=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("use", ["series", "gradient of an image"])
def test_every_method_follows_a_flipped_kernel(use, name):
    forward, x, shape, letters = USES[use]
    method = METHODS[name](targets=".*", layouts={"kernel": letters})
    frozen, trainable = method.init(KEY, {"kernel": 0.3 * jax.random.normal(KEY, shape)})
    floats = {"t": [f for f in jax.tree.leaves(trainable) if jnp.issubdtype(f.dtype, jnp.floating)]}
    moved = iter(noisy(floats)["t"])
    trainable = jax.tree.map(lambda f: next(moved) if jnp.issubdtype(f.dtype, jnp.floating) else f, trainable)
    got = pj.adapt(forward)(method.apply(frozen, trainable), x)
    assert_close(got, forward(method.merge(frozen, trainable), x), 1e-4)


FLAX = nn.ConvTranspose(4, (3,), strides=(2,), transpose_kernel=True)
OF_FLAX = {"ConvTranspose_0": FLAX.init(KEY, SERIES)["params"]}


def flax_forward(p, x):
    return FLAX.apply({"params": p["ConvTranspose_0"]}, x)


def test_a_transposed_convolution_of_flax_needs_no_layouts():
    assert_equals_merged(flax_forward, OF_FLAX, pj.lora(rank=2, targets=".*kernel"), SERIES)
    found = pj.layouts_of(flax_forward, OF_FLAX, SERIES, targets=".*kernel")
    assert found == {"^ConvTranspose_0/kernel": "ioi"}


def test_dora_does_not_take_the_inputs_of_a_transposed_kernel_for_its_outputs():
    guessed = pj.dora(rank=2, targets=".*kernel")
    with pytest.raises(PeftError, match="give those of the parameter"):
        pj.adapt(flax_forward)(guessed.apply(*guessed.init(KEY, OF_FLAX)), SERIES)
