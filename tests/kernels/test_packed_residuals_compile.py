"""The kernels of packed residuals, compiled for a TPU and a Hopper GPU, and when they are taken."""

import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernels.targets import compiled, mesh, shape

from peftjax.quantize import decode
from peftjax.quantize.affine import encode

pytestmark = pytest.mark.slow
CALL = {"tpu": "tpu_custom_call", "cuda": "triton"}


def there_and_back(bits):
    return lambda x: decode(encode(x, bits))


def calls(program, platform):
    return program.as_text().count(CALL[platform])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lengths", [(64, 768), (2, 512, 4096), (130, 11008)])
def test_kernels_compile_and_nothing_wide_is_made(platform, bits, dtype, lengths):
    operand = shape(*lengths, dtype=dtype)
    program = compiled(there_and_back(bits), (operand,), platform)
    assert calls(program, platform) >= 2
    assert program.memory_analysis().temp_size_in_bytes <= operand.size * (bits / 8 + 1 / 8)


@pytest.mark.parametrize(("platform", "taken"), [("tpu", False), ("cuda", True)])
def test_a_width_that_does_not_fill_lanes(platform, taken):
    program = compiled(there_and_back(8), (shape(3, 65, 896),), platform)
    assert (calls(program, platform) > 0) == taken


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_an_odd_width_takes_the_reference(platform):
    assert calls(compiled(there_and_back(4), (shape(7, 37),), platform), platform) == 0


def test_a_partitioned_program_takes_the_reference_and_moves_nothing():
    over = NamedSharding(mesh("tpu", (2, 2), ("x", "y")), P("x", "y"))
    text = compiled(there_and_back(8), (shape(256, 1024),), "tpu", (over,)).as_text()
    assert CALL["tpu"] not in text
    assert not [name for name in ("all-gather", "all-reduce", "collective-permute") if name in text]
