"""Temporaries of a training step of 12 linear layers whose update is a kernelised merge."""

import jax
import jax.numpy as jnp
import pytest
from kernels import naive_merge as naive
from kernels.targets import compiled, shape

from peftjax.kernels.kernelised_merge import sparse_update, threshold

pytestmark = pytest.mark.slow
LAYERS, D, TOKENS, Q = 12, 768, 1576, 16
MAP = naive.map_of("distance")


def merged(a, b, level):
    return sparse_update(a, b, {}, threshold(a, b, {}, level, MAP), MAP)


def naive_merged(a, b, level):
    size = jnp.abs(naive.dense(*jax.lax.stop_gradient((a, b)), {}, MAP))
    return naive.sparse(a, b, {}, jnp.quantile(size, level), MAP)


def step(merge, keep):
    def layer(x, kernel, a, b, level):
        return jnp.tanh(x @ kernel + x @ merge(a, b, level))

    # What a layer recomputes it does not keep: the updates.
    layer = layer if keep else jax.checkpoint(layer)

    def loss(factors, kernels, level, x):
        for kernel, (a, b) in zip(kernels, factors):
            x = layer(x, kernel, a, b, level)
        return jnp.sum(x)

    return jax.grad(loss)


def temporaries(merge, platform, keep=True):
    """Bytes."""
    factor = shape(2, Q, D)
    operands = [(factor, factor)] * LAYERS, [shape(D, D)] * LAYERS, shape(), shape(TOKENS, D)
    f = step(merge, keep)
    program = jax.jit(f).lower(*operands).compile() if platform == "cpu" else compiled(f, operands, platform)
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_third_of_autodiff(platform):
    assert 3 * temporaries(merged, platform) < temporaries(naive_merged, platform)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_recomputed_updates_are_not_kept(platform):
    kept, recomputed = (temporaries(merged, platform, keep) for keep in (True, False))
    assert kept - recomputed > 0.9 * (LAYERS - 1) * D * D * 4
