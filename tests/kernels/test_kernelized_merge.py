"""The kernelized merge's reference: values, gradients, residuals, and the laws of its papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import naive_merge as naive
from support import assert_close, quick_at

from peftjax import PeftError
from peftjax.kernels.kernelized_merge import KernelFunction, sparse_update, threshold, update

N, M = 37, 53
MODES = ["released", "paper", "hard", "none"]
CASES = [(kernel, "released") for kernel in naive.KERNELS] + [("distance", mode) for mode in MODES[1:]]
CASES.append(("mixed", "paper"))
COEFFICIENTS = (0.3, -0.1)  # a sum that is not zero, so that shifts have a gradient


def case(kernel, mode, stack=(), dtype=jnp.float32):
    kernel_function = naive.kernel_function_of(kernel, mode, COEFFICIENTS)
    a, b = naive.factors(N, M, stack=stack, dtype=dtype)
    scalars = naive.scalars_of(kernel_function, stack)
    size = np.abs(naive.dense(a, b, scalars, kernel_function, np)).reshape(*stack, N * M)
    return (
        kernel_function,
        a,
        b,
        scalars,
        jnp.float32(np.quantile(size, 0.6003, axis=-1)),
    )  # between two values


def gradients(f, g, *primals):
    return jax.jit(jax.grad(lambda *p: jnp.sum(f(*p) * g), tuple(range(len(primals)))))(*primals)


@pytest.mark.parametrize(("kernel", "mode"), quick_at(CASES, every=4))
def test_values(kernel, mode):
    kernel_function, a, b, scalars, t = case(kernel, mode)
    got = jax.jit(sparse_update, static_argnums=4)(a, b, scalars, t, kernel_function)
    want = naive.sparse(a, b, scalars, t, kernel_function, np)
    assert got.dtype == jnp.float32
    assert np.abs(got - want).max() < 2e-6 * np.abs(want).max()
    assert_close(
        update(a, b, scalars, kernel_function), naive.dense(a, b, scalars, kernel_function, np), 2e-6
    )


@pytest.mark.parametrize(("kernel", "mode"), quick_at(CASES, every=4))
def test_gradients_are_those_of_autodiff(kernel, mode):
    kernel_function, a, b, scalars, t = case(kernel, mode)
    g = 1 + jax.random.normal(jax.random.key(5), (N, M))  # so that no scalar's gradient cancels
    got = gradients(lambda *p: sparse_update(*p, t, kernel_function), g, a, b, scalars)
    want = gradients(lambda *p: naive.sparse(*p, t, kernel_function), g, a, b, scalars)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        largest = float(jnp.abs(right).max())
        assert largest > 0
        assert float(jnp.abs(left - right).max()) < 1e-5 * largest, right.shape


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["distance", "mixed"])
def test_stacks_vmap_scan_and_checkpoint(kernel):
    kernel_function, a, b, scalars, t = case(kernel, "released", stack=(2, 2))
    g = jax.random.normal(jax.random.key(5), (2, 2, N, M))

    def scanned(a, b, scalars):
        step = jax.checkpoint(jax.vmap(lambda *p: sparse_update(*p, kernel_function)))
        return jax.lax.scan(lambda _, p: (None, step(*p)), None, (a, b, scalars, t))[1]

    want = gradients(lambda *p: naive.sparse(*p, t, kernel_function), g, a, b, scalars)
    assert_close(gradients(lambda *p: sparse_update(*p, t, kernel_function), g, a, b, scalars), want)
    assert_close(gradients(scanned, g, a, b, scalars), want)


def test_bfloat16_factors_are_computed_in_float32():
    kernel_function, a, b, scalars, t = case("distance", "released", dtype=jnp.bfloat16)
    got = sparse_update(a, b, scalars, t, kernel_function)
    want = sparse_update(a.astype(jnp.float32), b.astype(jnp.float32), scalars, t, kernel_function)
    np.testing.assert_array_equal(got, want)
    of_a, of_b = gradients(lambda a, b: sparse_update(a, b, scalars, t, kernel_function), 1.0, a, b)
    assert of_a.dtype == of_b.dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel", naive.KERNELS)
def test_nothing_of_the_matrix_is_kept(kernel):
    kernel_function, a, b, scalars, t = case(kernel, "released")
    _, pullback = jax.vjp(lambda *p: sparse_update(*p, t, kernel_function), a, b, scalars)
    kept = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert kept
    assert all(np.prod(shape) < N * M for shape in kept)


@pytest.mark.parametrize("kernel", ["distance", "rbf", "mixed"])
def test_equal_vectors(kernel):
    kernel_function, a, b, scalars, _ = case(kernel, "none")
    b = b.at[..., :9].set(a[..., 4:13])
    t = jnp.float32(0)
    dw = update(a, b, scalars, kernel_function)
    assert_close(dw, naive.dense(a, b, scalars, kernel_function, np), 1e-5)
    if kernel == "distance":
        assert float(jnp.abs(dw[4, 0])) == 0.0
    g = jax.random.normal(jax.random.key(5), (N, M))
    got = gradients(lambda *p: sparse_update(*p, t, kernel_function), g, a, b, scalars)
    assert_close(got, gradients(lambda *p: naive.sparse(*p, t, kernel_function), g, a, b, scalars))


def test_linear_kernel_is_lora():
    kernel_function = KernelFunction("linear", (1.0,), "none")
    a, b = naive.factors(N, M, heads=1)
    g = jax.random.normal(jax.random.key(5), (N, M))
    np.testing.assert_allclose(update(a, b, {}, kernel_function), a[0].T @ b[0], rtol=1e-6, atol=1e-6)
    got = gradients(lambda a, b: update(a, b, {}, kernel_function), g, a, b)
    assert_close(got, gradients(lambda a, b: a[0].T @ b[0], g, a, b))


def test_pruned_entries_give_no_gradient_and_scale_is_squared():
    kernel_function, a, b, scalars, t = case("distance", "released")
    dw = sparse_update(a, b, scalars, t, kernel_function)
    pruned = (dw == 0).astype(jnp.float32)
    assert 0 < float(pruned.mean()) < 1
    for gradient in gradients(lambda a, b: sparse_update(a, b, scalars, t, kernel_function), pruned, a, b):
        assert float(jnp.abs(gradient).max()) == 0.0
    assert_close(sparse_update(3 * a, 3 * b, scalars, 3 * t, kernel_function), 9 * dw)


def test_roles_swap_and_common_offsets_do_nothing():
    kernel_function, a, b, scalars, _ = case("distance", "none")
    dw = update(a, b, scalars, kernel_function)
    assert_close(update(b, a, scalars, kernel_function), dw.T)
    offset = jax.random.normal(jax.random.key(3), (2, 3, 1))
    assert_close(update(a + offset, b + offset, scalars, kernel_function), dw)


def at_released_init(n=768, m=768, rank=32):
    keys = jax.random.split(jax.random.key(0), 2)
    q = rank // 2
    draw = lambda key, size: jax.random.uniform(key, (2, q, size), minval=-1.0) / np.sqrt(size * q)
    return draw(keys[0], n), draw(keys[1], m)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_distances_do_not_cancel(offset):
    a, b = at_released_init()
    a, b = a + offset, b + offset  # rounded to float32 here: the wanted number is of the rounded factors
    got = np.asarray(update(a, b, {}, KernelFunction()), np.float64)
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = sum((x[:, k, :, None] - y[:, k, None, :]) ** 2 for k in range(x.shape[1]))
    want = 0.1 * (np.sqrt(squares[0]) - np.sqrt(squares[1]))
    assert np.abs(got - want).max() < 1e-5 * want.std()


def test_rank_is_far_above_that_of_the_factors():
    values = np.linalg.svd(np.asarray(update(*at_released_init(), {}, KernelFunction())), compute_uv=False)
    assert (values > 1e-3 * values[0]).sum() > 500


def test_mixed_terms():
    plain, (a, b) = KernelFunction(), naive.factors(N, M)
    mixed = lambda **scalars: update(
        a, b, {k: jnp.float32(v) for k, v in scalars.items()}, KernelFunction(mixed=True)
    )
    dw = update(a, b, {}, plain)
    np.testing.assert_array_equal(mixed(alpha=0, gamma=1, beta=0), dw)
    assert_close(mixed(alpha=1, gamma=1e8, beta=0), dw + 1 / M)
    added = mixed(alpha=0.7, gamma=0.3, beta=0) - dw
    np.testing.assert_allclose(added.sum(-1), 0.7, rtol=1e-5)
    assert_close(mixed(alpha=0.7, gamma=0.3, beta=2), dw + added + 2)


def test_errors():
    a, b = naive.factors(4, 5)
    t = jnp.float32(0)
    for wrong in (
        lambda: KernelFunction("cosine"),
        lambda: KernelFunction("linear", mixed=True),
        lambda: KernelFunction(coefficients=()),
        lambda: update(a, b[:, :2], {}, KernelFunction()),
        lambda: update(a, b, {}, KernelFunction(coefficients=(1.0,))),
        lambda: update(a, b, {}, KernelFunction("rbf")),
        lambda: update(a, b, dict.fromkeys(("alpha", "beta", "gamma"), t), KernelFunction()),
        lambda: threshold(a, b, {}, jnp.zeros(3), KernelFunction()),
    ):
        with pytest.raises(PeftError):
            wrong()
