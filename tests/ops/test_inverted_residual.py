"""MobileTL on an inverted residual block: which gradients stay exact, and what the backward pass keeps.

Chiang et al., "MobileTL: On-Device Transfer Learning with Inverted Residual Blocks", AAAI 2023, arXiv
2212.03246. Only what the abstract says is followed: shifts of the inner norms, activations of one bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import normal

from peftjax.ops.coded.activation import with_mask
from peftjax.planner.residuals import kept_arrays, nbytes

WIDTH, EXPANSION = 8, 6
INNER = WIDTH * EXPANSION
X = normal(jax.random.key(0), (2, 4, 4, WIDTH))
KERNELS = {"expand": (1, 1, WIDTH, INNER), "depthwise": (3, 3, 1, INNER), "project": (1, 1, INNER, WIDTH)}
TRAINABLE = {
    **{name: 0.4 * normal(jax.random.key(n), shape) for n, (name, shape) in enumerate(KERNELS.items())},
    "shift1": 0.1 * normal(jax.random.key(4), (INNER,)),
    "shift2": 0.1 * normal(jax.random.key(5), (INNER,)),
    "shift3": jnp.zeros(WIDTH),
    "scale3": jnp.ones(WIDTH),
}
# γ/σ of the inner norms; with the mean in the shift, all that is left of statistics that stay.
FROZEN = {"slope1": jnp.linspace(0.5, 1.5, INNER), "slope2": jnp.linspace(1.5, 0.5, INNER)}


def convolve(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def block(act, t, frozen, x):
    x = jnp.sin(x)  # made inside, so that to keep it is to keep an array
    h = act(frozen["slope1"] * convolve(x, t["expand"]) + t["shift1"])
    h = act(frozen["slope2"] * convolve(h, t["depthwise"], INNER) + t["shift2"])
    return t["scale3"] * convolve(h, t["project"]) + t["shift3"]


def loss(act, t, frozen, x):
    return jnp.sum(jnp.cos(block(act, t, frozen, x)))


def test_relu6_is_exact_and_hard_swish_passes_all_or_nothing():
    for f in (jax.nn.relu6, jax.nn.hard_swish):
        np.testing.assert_array_equal(
            block(with_mask(f), TRAINABLE, FROZEN, X), block(f, TRAINABLE, FROZEN, X)
        )
    exact, masked = (
        jax.grad(partial(loss, act))(TRAINABLE, FROZEN, X) for act in (jax.nn.relu6, with_mask(jax.nn.relu6))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), exact, masked)
    u = jnp.linspace(-4.0, 4.0, 41)
    slope = jax.vmap(jax.grad(lambda u: with_mask(jax.nn.hard_swish)(u[None])[0]))(u)
    np.testing.assert_array_equal(slope[jnp.abs(u) > 1e-3], (u > 0)[jnp.abs(u) > 1e-3])


@pytest.mark.parametrize("f", [jax.nn.relu6, jax.nn.hard_swish])
def test_a_block_keeps_the_inputs_of_its_convolutions_and_a_bit_for_each_activation(f):
    arrays, exact = (
        [
            one
            for one in kept_arrays(partial(block, act), TRAINABLE, FROZEN, X)
            if one.shape[:3] == X.shape[:3]
        ]
        for act in (with_mask(f), jax.nn.hard_swish)
    )
    wide, narrow = (*X.shape[:-1], INNER), X.shape
    found = sorted((str(array.dtype), array.shape) for array in arrays)
    mask = ("uint8", (*X.shape[:-1], INNER // 8))
    # x, what the last convolution gives (for its scale), both inner activations, and their masks.
    assert found == sorted([("float32", narrow)] * 2 + [("float32", wide)] * 2 + [mask] * 2)
    assert nbytes(arrays) == 14.375 * X.nbytes
    assert nbytes(exact) >= 26 * X.nbytes
