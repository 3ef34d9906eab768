"""The kernels of the kernelized merge, compiled for a TPU and a Hopper GPU, and when they are taken."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import naive_merge as naive
from kernels.targets import compiled, devices, mesh, shape

from peftjax.kernels.kernelized_merge import sparse_update, threshold

pytestmark = pytest.mark.slow
CALL = {"tpu": "tpu_custom_call", "cuda": "triton"}


def step(kernel_function, implementation="auto"):
    """The threshold, the update and the gradients of a matrix or a stack."""

    def run(a, b, scalars, level, g):
        t = threshold(a, b, scalars, level, kernel_function, implementation=implementation)
        dw, pull = jax.vjp(
            lambda *p: sparse_update(*p, t, kernel_function, implementation=implementation), a, b, scalars
        )
        return t, dw, pull(g)

    return run


def operands(kernel_function, n, m, q=16, stack=()):
    of_stack = shape(*stack)
    scalars = dict.fromkeys(kernel_function.scalars, of_stack)
    return shape(*stack, 2, q, n), shape(*stack, 2, q, m), scalars, of_stack, shape(*stack, n, m)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("kernel", naive.KERNELS)
def test_kernels_compile(platform, kernel):
    kernel_function = naive.kernel_function_of(kernel)
    program = compiled(step(kernel_function), operands(kernel_function, 768, 3072), platform)
    assert program.as_text().count(CALL[platform]) >= 3


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_odd_shapes_and_stacks_compile(platform):
    kernel_function = naive.kernel_function_of("mixed", "paper")
    program = compiled(step(kernel_function), operands(kernel_function, 337, 1153, q=3, stack=(2,)), platform)
    assert CALL[platform] in program.as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_matrix_is_made_but_the_update(platform):
    kernel_function, n, m = naive.kernel_function_of("distance"), 4096, 11008
    a, b, scalars, level, _ = operands(kernel_function, n, m)
    t = lambda *p: threshold(*p, kernel_function)
    gradient = lambda a, b, t, g: jax.vjp(lambda a, b: sparse_update(a, b, {}, t, kernel_function), a, b)[1](
        g
    )
    for program in (
        compiled(t, (a, b, scalars, level), platform),
        compiled(gradient, (a, b, level, shape(n, m)), platform),
    ):
        assert program.memory_analysis().temp_size_in_bytes < n * m * 4 / 4


def test_a_partitioned_program_takes_the_reference():
    kernel_function = naive.kernel_function_of("distance")
    a, b, scalars, level, g = operands(kernel_function, 768, 1024)
    over = mesh("tpu", (2, 2), ("x", "y"))
    at = lambda *spec: NamedSharding(over, P(*spec))
    spread = (at(None, None, "x"), at(None, None, "y"), {}, at(), at("x", "y"))
    program = compiled(step(kernel_function), (a, b, scalars, level, g), "tpu", spread)
    assert CALL["tpu"] not in program.as_text()
    with pytest.raises(Exception, match="automatically partitioned"):
        compiled(step(kernel_function, "pallas"), (a, b, scalars, level, g), "tpu", spread)


def test_device_code_takes_the_kernels():
    kernel_function = naive.kernel_function_of("distance")
    a, b, _, level, _ = operands(kernel_function, 768, 1024)
    over = mesh("tpu", (4,), ("x",))
    specs = (P(None, None, "x"), P(), P())
    local = jax.shard_map(
        lambda a, b, t: sparse_update(a, b, {}, t, kernel_function),
        mesh=over,
        in_specs=specs,
        out_specs=P("x"),
    )
    f = jax.grad(lambda a, b, t: jnp.sum(jnp.sin(local(a, b, t))), (0, 1))
    program = compiled(f, (a, b, level), "tpu", tuple(NamedSharding(over, spec) for spec in specs))
    assert program.as_text().count(CALL["tpu"]) >= 3
    assert len(devices("tpu")) == 4
