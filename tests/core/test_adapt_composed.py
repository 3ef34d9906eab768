"""Weights that a model scales or normalizes and also mixes, joins, flips or uses in ragged products."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support import KEY, assert_equals_merged, assert_no_dense_gradient, normal, quick_at

import peftjax as pj

E, N, M = 3, 6, 8
X = normal(KEY, (4, N))
SERIES = normal(KEY, (2, 5, N))
EXPERTS = normal(KEY, (E, N, M))
SWAPPED = normal(KEY, (E, M, N))
KERNEL = normal(KEY, (3, N, M))
INPUTS, OUTPUTS = (1.0 + jax.random.uniform(KEY, (size,)) for size in (N, M))
ROUTED = jax.nn.softmax(normal(KEY, (4, E)))
SIZES = jnp.array([1, 0, 3])


def unit(w):
    return w / jnp.linalg.norm(w, axis=1, keepdims=True)


def conv(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def ragged_gradient(w, x):
    scaled = w * OUTPUTS * INPUTS[:, None]
    return jax.grad(lambda x: jnp.sum(jnp.tanh(lax.ragged_dot(x, scaled, SIZES))))(x)


USES = {
    "scaled and weighed": (EXPERTS, "sio", lambda w, x: jnp.einsum("td,te,edf->tf", x, ROUTED, w * OUTPUTS)),
    "normalized and chosen": (
        EXPERTS,
        "sio",
        lambda w, x: jnp.einsum("td,tdf->tf", x, jnp.einsum("te,edf->tdf", ROUTED, unit(w))),
    ),
    "scaled and summed": (EXPERTS, "sio", lambda w, x: x @ (w * INPUTS[:, None]).sum(0)),
    "mixed and scaled": (EXPERTS, "sio", lambda w, x: x @ (jnp.einsum("e,edf->df", ROUTED[0], w) * OUTPUTS)),
    "normalized and ragged": (EXPERTS, "sio", lambda w, x: lax.ragged_dot(x, unit(w), SIZES)),
    "scaled, swapped and ragged": (
        SWAPPED,
        "soi",
        lambda w, x: lax.ragged_dot(x, (w * OUTPUTS[:, None] * INPUTS).swapaxes(1, 2), SIZES),
    ),
    "gradient of a ragged product": (EXPERTS, "sio", ragged_gradient),
    "concatenated and scaled": (
        EXPERTS[0],
        "io",
        lambda w, x: x @ (jnp.concatenate([w, EXPERTS[1]], 1) * jnp.tile(OUTPUTS, 2)),
    ),
    "scaled and flipped": (KERNEL, "iio", lambda w, x: conv(SERIES, (w * OUTPUTS)[::-1])),
    "gradient of a scaled kernel": (
        KERNEL,
        "iio",
        lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(conv(x, w * OUTPUTS))))(SERIES),
    ),
}


@pytest.mark.parametrize("name", quick_at(USES, every=3))
def test_it_is_that_of_the_merged_weight_and_gets_no_dense_gradient(name):
    w, letters, use = USES[name]
    method = pj.lora(rank=2, targets=".*", layouts={"w": letters})
    case = (lambda params, x: use(params["w"], x), {"w": w}, method, X)
    assert_equals_merged(*case, tolerance=1e-4)
    assert_no_dense_gradient(*case)
