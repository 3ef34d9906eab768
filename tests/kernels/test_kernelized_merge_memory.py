"""Temporaries of a training step of 12 linear layers whose update is a kernelized merge."""

import jax
import jax.numpy as jnp
import pytest
from kernels import naive_merge as naive
from kernels.targets import compiled, shape

from peftjax.kernels.kernelized_merge import sparse_update, threshold

pytestmark = pytest.mark.slow
LAYERS, D, TOKENS, Q = 12, 768, 1576, 16
MAP = naive.kernel_function_of("distance")


def merged(a, b, level):
    return sparse_update(a, b, {}, threshold(a, b, {}, level, MAP), MAP)


def naive_merged(a, b, level):
    size = jnp.abs(naive.dense(*jax.lax.stop_gradient((a, b)), {}, MAP))
    return naive.sparse(a, b, {}, jnp.quantile(size, level), MAP)


def step(merge):
    def loss(factors, kernels, level, x):
        for kernel, (a, b) in zip(kernels, factors):
            x = jnp.tanh(x @ kernel + x @ merge(a, b, level))
        return jnp.sum(x)

    return jax.grad(loss)


def temporaries(merge, platform):
    """Bytes."""
    factor = shape(2, Q, D)
    operands = [(factor, factor)] * LAYERS, [shape(D, D)] * LAYERS, shape(), shape(TOKENS, D)
    f = step(merge)
    program = jax.jit(f).lower(*operands).compile() if platform == "cpu" else compiled(f, operands, platform)
    return program.memory_analysis().temp_size_in_bytes


def test_a_third_of_autodiff_on_a_cpu():
    assert 3 * temporaries(merged, "cpu") < temporaries(naive_merged, "cpu")


def test_kernels_against_autodiff_on_a_gpu():
    # XLA fuses the differences of vectors there: what is saved is the matrices of the update and threshold.
    assert temporaries(merged, "cuda") < 0.6 * temporaries(naive_merged, "cuda")
