"""The kernels of the kernelized merge, interpreted, against its reference: values, gradients, thresholds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernels import naive_merge as naive
from support import assert_close

from peftjax import PeftError
from peftjax.kernels.kernelized_merge import fused, gpu, reference, sparse_update, threshold, tpu, update

# Tiles that leave a border of 37 x 53 and divide 32 x 64; a TPU's own tile holds all of either.
RUNS = {
    "tpu-tiles": partial(tpu.run, interpret=True, tile=(16, 32)),
    "gpu-tiles": partial(gpu.run, interpret=True, tile=(16, 32)),
}
CASES = [("tpu-tiles", kernel, "released") for kernel in naive.KERNELS]
# The steps are those of the TPU: what differs is how tiles are read and outputs carried.
CASES += [("gpu-tiles", "distance", "released"), ("gpu-tiles", "mixed", "paper")]


def case(kernel, mode, n=37, m=53, stack=(), **options):
    kernel_function = naive.kernel_function_of(kernel, mode, (0.3, -0.1))
    a, b = naive.factors(n, m, stack=stack, **options)
    scalars = naive.scalars_of(kernel_function, stack)
    size = np.abs(naive.dense(a, b, scalars, kernel_function, np)).reshape(*stack, n * m)
    return kernel_function, a, b, scalars, jnp.float32(np.quantile(size, 0.6003, axis=-1))


def forward_and_backward(of, kernel_function, *operands):
    a, b, scalars, t, g = operands
    return of("forward")(a, b, scalars, t, kernel_function), of("backward")(
        a, b, scalars, t, g, kernel_function
    )


def assert_like_reference(run, kernel_function, a, b, scalars, t):
    g = 1 + jax.random.normal(jax.random.key(5), (*t.shape, a.shape[-1], b.shape[-1]))
    with_kernels = partial(
        forward_and_backward, lambda name: partial(getattr(fused, name), run), kernel_function
    )
    plain = partial(forward_and_backward, partial(getattr, reference), kernel_function)
    got, want = (jax.jit(f)(a, b, scalars, t, g) for f in (with_kernels, plain))
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert left.shape == right.shape
        largest = float(jnp.abs(right).max())
        assert largest > 0
        assert float(jnp.abs(left - right).max()) < 1e-5 * largest


@pytest.mark.slow
@pytest.mark.parametrize(("run", "kernel", "mode"), CASES)
def test_odd_shapes(run, kernel, mode):
    assert_like_reference(RUNS[run], *case(kernel, mode))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["tpu-tiles", "gpu-tiles"])
def test_stacks_of_bfloat16_whole_tiles_and_another_rank(run):
    assert_like_reference(RUNS[run], *case("mixed", "released", 32, 64, (2, 1), q=17, dtype=jnp.bfloat16))


def test_equal_vectors():
    kernel_function, a, b, scalars, t = case("distance", "none")
    assert_like_reference(RUNS["tpu-tiles"], kernel_function, a, b.at[..., :9].set(a[..., 4:13]), scalars, t)


@pytest.mark.parametrize(("run", "kernel", "mode"), [CASES[4], CASES[5]])
def test_thresholds(run, kernel, mode):
    kernel_function, a, b, scalars, _ = case(kernel, mode)
    find = jax.jit(lambda level: fused.threshold(RUNS[run], a, b, scalars, level, kernel_function))
    size = np.abs(naive.dense(a, b, scalars, kernel_function, np))
    for level in (0.0, 0.37, 0.995):
        np.testing.assert_allclose(find(jnp.float32(level)), np.quantile(size, level), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_forced_on_a_cpu_under_vmap_scan_and_checkpoint():
    kernel_function, a, b, scalars, _ = case("mixed", "released", stack=(2, 2))

    def merged(a, b, scalars, implementation):
        t = threshold(a, b, scalars, jnp.float32(0.6003), kernel_function, implementation=implementation)
        return sparse_update(a, b, scalars, t, kernel_function, implementation=implementation)

    def total(implementation, *p):
        step = jax.checkpoint(jax.vmap(partial(merged, implementation=implementation)))
        return jnp.sum(jnp.sin(jax.lax.scan(lambda _, p: (None, step(*p)), None, p)[1]))

    def grads(implementation):
        return jax.jit(jax.value_and_grad(partial(total, implementation), (0, 1, 2)))(a, b, scalars)

    assert_close(grads("pallas"), grads("reference"))


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_device_code_of_a_shard_map(implementation):
    kernel_function, a, b, scalars, t = case("mixed", "released", 24, 32)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    def shards(a, b, scalars):
        local = partial(sparse_update, t=t, kernel_function=kernel_function, implementation=implementation)
        rows, whole = P(None, None, "x"), P()
        specs = {"in_specs": (rows, whole, whole), "out_specs": P("x")}
        # JAX interprets no kernel where it checks what varies over the mesh.
        return jax.shard_map(local, mesh=mesh, **specs, check_vma=implementation == "auto")(a, b, scalars)

    total = lambda f: jax.jit(jax.value_and_grad(lambda *p: jnp.sum(jnp.sin(f(*p))), (0, 1, 2)))(
        a, b, scalars
    )
    assert_close(total(shards), total(lambda *p: sparse_update(*p, t, kernel_function)))


def test_an_unknown_implementation_is_an_error():
    kernel_function, a, b, scalars, _ = case("linear", "none")
    with pytest.raises(PeftError, match="cuda"):
        update(a, b, scalars, kernel_function, implementation="cuda")
