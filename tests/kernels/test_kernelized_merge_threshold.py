"""The threshold of the kernelized merge: order statistics without a sort, traced levels, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import naive_merge as naive
from support import quick_at

from peftjax.kernels.kernelized_merge import KernelFunction, selection, sparse_update, threshold, update

LEVELS = [0.0, 0.1, 0.35, 0.5, 0.9, 0.995, 1.0]
N, M = 37, 53


def of_array(values, level, kernel_function, bits_per_pass=1):
    count = selection.counter(jnp.asarray(values, jnp.float32)[None])
    return selection.quantile(count, level, np.size(values), kernel_function, bits_per_pass)


of_array = jax.jit(of_array, static_argnums=(2, 3))


@pytest.mark.parametrize("bits_per_pass", [1, 3, 4])
def test_order_statistics(bits_per_pass):
    values = np.abs(np.random.default_rng(0).standard_normal(501).astype(np.float32))
    values[:60] = values[60:120]  # pairs of equals
    values[200:260] = 0
    values[300] = 1e30
    for level in np.float32(LEVELS):
        want = np.quantile(values.astype(np.float64), level)
        assert of_array(values, level, KernelFunction(), bits_per_pass) == pytest.approx(
            want, rel=1e-4, abs=1e-7
        )
        place = max(int(np.ceil(level * np.float32(501))) - 1, 0)
        assert of_array(values, level, KernelFunction(mode="paper"), bits_per_pass) == np.sort(values)[place]


@pytest.mark.parity
def test_equals_torch_quantile():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    values = np.abs(np.random.default_rng(0).standard_normal(10_007)).astype(np.float32)
    for level in LEVELS:
        want = torch.quantile(torch.from_numpy(values), torch.tensor(level)).item()
        assert of_array(values, jnp.float32(level), KernelFunction()) == want


@pytest.mark.parametrize("mode", ["released", "hard"])
def test_kept_count(mode):
    kernel_function, (a, b) = KernelFunction(mode=mode), naive.factors(N, M)
    size = np.abs(np.asarray(update(a, b, {}, kernel_function)))
    for level in LEVELS:
        t = threshold(a, b, {}, jnp.float32(level), kernel_function)
        kept = np.asarray(sparse_update(a, b, {}, t, kernel_function)) != 0
        # A value that t equals may be rounded otherwise when it is computed again.
        assert abs(kept.sum() - (N * M - np.floor(np.float32(level) * (N * M - 1)) - 1)) <= 1
        assert (size[~kept] <= t * (1 + 1e-5)).all()
        assert (size[kept] > t * (1 - 1e-5)).all()


def test_a_stack_has_a_threshold_each():
    kernel_function, (a, b) = naive.kernel_function_of("mixed"), naive.factors(N, M, stack=(3,))
    scalars, levels = naive.scalars_of(kernel_function, (3,)), jnp.array([0.1, 0.5, 0.9])
    size = np.abs(naive.dense(a, b, scalars, kernel_function, np)).reshape(3, N * M)
    want = [np.quantile(values, level) for values, level in zip(size, levels)]
    find = lambda *p: threshold(*p, kernel_function)
    np.testing.assert_allclose(jax.jit(find)(a, b, scalars, levels), want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(find))(a, b, scalars, levels), want, rtol=1e-5)


def test_another_level_compiles_nothing():
    a, b = naive.factors(N, M)
    run = jax.jit(lambda level: threshold(a, b, {}, level, KernelFunction()))
    found = [float(run(jnp.float32(level))) for level in LEVELS]
    assert found == sorted(found)
    assert run._cache_size() == 1


def test_is_a_constant_to_the_gradient():
    a, b = naive.factors(N, M)
    of_a, of_level = jax.grad(lambda a, level: threshold(a, b, {}, level, KernelFunction()), (0, 1))(
        a, jnp.float32(0.5)
    )
    assert float(jnp.abs(of_a).max()) == float(of_level) == 0.0


@pytest.mark.parametrize("kind", quick_at([AxisType.Auto, AxisType.Explicit], 0))
@pytest.mark.parametrize("kernel", ["distance", "mixed"])
def test_sharded_over_inputs_and_outputs(kernel, kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    kernel_function, (a, b) = naive.kernel_function_of(kernel), naive.factors(24, 32)
    scalars, g = naive.scalars_of(kernel_function), jax.random.normal(jax.random.key(2), (24, 32))

    def run(a, b, scalars, g):
        t = threshold(a, b, scalars, jnp.float32(0.7), kernel_function)
        dw, pullback = jax.vjp(lambda *p: sparse_update(*p, t, kernel_function), a, b, scalars)
        return t, dw, pullback(g)

    want = jax.jit(run)(a, b, scalars, g)
    place = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
    operands = place(a, None, None, "x"), place(b, None, None, "y"), place(scalars), place(g, "x", "y")
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*operands)
    assert got[1].sharding.spec == P("x", "y")
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-5), got, want)
    assert int((got[1] != 0).sum()) == int((want[1] != 0).sum())


@pytest.mark.slow
def test_a_matrix_larger_than_a_sort_takes():
    a, b = naive.factors(4096, 11008, q=2)
    level = jnp.float32(0.9)
    t = jax.jit(lambda a, b: threshold(a, b, {}, level, KernelFunction()))(a, b)
    kept = jax.jit(lambda a, b: jnp.sum(jnp.abs(update(a, b, {}, KernelFunction())) > t))(a, b)
    size = 4096 * 11008
    assert abs(int(kept) - (1 - np.float32(0.9)) * size) <= 4  # float32 positions are 4 apart there
