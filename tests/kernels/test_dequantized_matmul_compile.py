"""The kernels of the product with a coded weight, compiled for two accelerators, and when they are taken."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernels.targets import compiled, mesh, shape
from kernels.test_dequantized_matmul import NF4, TABLES

from peftjax.kernels.dequantized_matmul import dequantized_matmul, reference

pytestmark = pytest.mark.slow
CALL = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
LARGE = (4096, 11008)


def coded(table, out, width, group, stack=()):
    """The types of codes and scales."""
    per_byte, dtype = (1, jnp.int8) if table is None else (2, jnp.uint8)
    return shape(*stack, out, width // per_byte, dtype=dtype), shape(*stack, out, width // group)


def calls(program, platform):
    return len(re.findall(rf'custom_call_target="{re.escape(CALL[platform])}"', program.as_text()))


def largest_float(program):
    """Elements of the largest floating-point array of a program, whatever its shape."""
    found = re.findall(r"\b(?:f64|f32|f16|bf16)\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, lengths.split(","))) for lengths in found)


def both_ways(table, group):
    """y, and the gradients of x and the factors."""

    def run(x, codes, scales, shifts, u, v, g):
        f = lambda x, u, v: dequantized_matmul(x, codes, scales, shifts, u, v, table=table, group=group)
        y, pull = jax.vjp(f, x, u, v)
        return y, pull(g)

    return run


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "group", "lengths", "n", "dtype", "more"),
    [
        ("nf4", 64, LARGE, 2048, jnp.bfloat16, True),
        ("nf4", 64, LARGE[::-1], 1, jnp.bfloat16, False),
        ("int4", 128, (4096, 4096), 300, jnp.bfloat16, True),
        ("mxfp4", 32, (896, 4864), 130, jnp.bfloat16, False),
        ("int8", 4000, (4000, 1000), 130, jnp.float32, True),
        ("int8", 16, (1296, 640), 7, jnp.bfloat16, False),
        ("nf4", 16, (336, 165), 7, jnp.float32, True),
    ],
)
def test_kernels_compile_and_no_weight_is_dense(platform, name, group, lengths, n, dtype, more):
    width, out = lengths
    codes, scales = coded(TABLES[name], out, width, group)
    u, v = (shape(n, 16, dtype=dtype), shape(16, out, dtype=dtype)) if more else (None, None)
    shifts = scales if more and name != "nf4" else None
    operands = (shape(n, width, dtype=dtype), codes, scales, shifts, u, v, shape(n, out, dtype=dtype))
    program = compiled(both_ways(TABLES[name], group), operands, platform)
    assert calls(program, platform) == 2
    assert largest_float(program) < width * out
    # No more than x in its halves, and scales and factors as a kernel takes them.
    spent = 4 * (2 * max(n, 16) * max(width, out) + 2 * width * out // group)
    assert program.memory_analysis().temp_size_in_bytes <= spent


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_layers_that_are_scanned_and_experts_that_are_mapped(platform):
    layers, experts, width, n = 4, 3, 1024, 200
    codes, scales = coded(NF4, width, width, 64, (layers, experts))
    factors = shape(layers, experts, width, 8), shape(layers, experts, 8, width)

    def layer(x, codes, scales, a, b):
        return dequantized_matmul(x, codes, scales, None, x @ a, b, table=NF4, group=64)

    def loss(factors, x, codes, scales):
        step = lambda x, stored: (jnp.tanh(jax.vmap(layer)(x, *stored)), None)
        return jnp.sum(jax.lax.scan(step, x, (codes, scales, *factors))[0])

    operands = (factors, shape(experts, n, width), codes, scales)
    program = compiled(jax.grad(loss), operands, platform)
    assert calls(program, platform) == 2
    assert largest_float(program) < experts * width * width
    # The inputs of four layers and what their gradients are made of, and a layer's codes.
    assert program.memory_analysis().temp_size_in_bytes < 4 * experts * width * (3 * layers * n + width)


def test_a_partitioned_program_takes_the_reference_and_moves_no_codes():
    width, out = 4096, 8192
    over = mesh("tpu", (2, 2), ("x", "y"))
    at = lambda *spec: NamedSharding(over, P(*spec))
    codes, scales = coded(NF4, out, width, 64)
    f = lambda x, codes, scales: dequantized_matmul(x, codes, scales, table=NF4, group=64)
    operands = shape(64, width, dtype=jnp.bfloat16), codes, scales
    program = compiled(f, operands, "tpu", (at("x"), at("y"), at("y")))
    text = program.as_text()
    assert calls(program, "tpu") == 0
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute") if name in text]
    assert largest_float(program) <= reference.LARGEST


def test_device_code_takes_the_kernels():
    width, out = 512, 1024
    over = mesh("tpu", (4,), ("x",))
    f = lambda x, codes, scales, u, v: dequantized_matmul(x, codes, scales, None, u, v, table=NF4, group=64)
    specs = (P("x"), P(), P(), P("x"), P())
    local = jax.shard_map(f, mesh=over, in_specs=specs, out_specs=P("x"))
    gradient = jax.grad(lambda *p: jnp.sum(jnp.sin(local(*p))), (0, 3, 4))
    operands = (shape(64, width), *coded(NF4, out, width, 64), shape(64, 8), shape(8, out))
    program = compiled(gradient, operands, "tpu", tuple(NamedSharding(over, spec) for spec in specs))
    assert calls(program, "tpu") == 2
    assert "all-reduce" in program.as_text()
