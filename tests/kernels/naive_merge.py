"""The kernelized merge as its formulas read: in float64 numpy, and in jnp for autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.kernels.kernelized_merge import KernelFunction

SCALARS = {
    "scale": 0.7,
    "rate": 1.3,
    "shift": -0.2,
    "alpha": 0.8,
    "gamma": 0.6,
    "beta": 0.05,
}
KERNELS = ["distance", "linear", "sigmoid", "rbf", "mixed"]


def kernel_function_of(kernel, mode="released", coefficients=(0.1, -0.1)):
    if kernel == "mixed":
        return KernelFunction("distance", coefficients, mode, mixed=True)
    return KernelFunction(kernel, coefficients, mode)


def factors(n, m, q=3, heads=2, stack=(), seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 2)
    a = jax.random.normal(keys[0], (*stack, heads, q, n), dtype)
    return a, jax.random.normal(keys[1], (*stack, heads, q, m), dtype)


def scalars_of(kernel_function, stack=()):
    """Other numbers for every matrix of a stack."""
    spread = 1 + 0.1 * jnp.arange(int(np.prod(stack)), dtype=jnp.float32).reshape(stack)
    return {name: SCALARS[name] * spread for name in kernel_function.scalars}


def dense(a, b, scalars, kernel_function, xp=jnp):
    """dW by differences of vectors; with `xp=np` in float64."""
    if xp is np:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scalars = {k: np.asarray(v, np.float64) for k, v in scalars.items()}
    s = {k: v[..., None, None] for k, v in scalars.items()}
    x, y = xp.swapaxes(a, -1, -2)[..., :, None, :], xp.swapaxes(b, -1, -2)[..., None, :, :]
    if kernel_function.of_distance:
        squares = ((x - y) ** 2).sum(-1)
        if kernel_function.kernel == "rbf":
            kernels = s["scale"][..., None] * xp.exp(-s["rate"][..., None] * squares) + s["shift"][..., None]
        else:
            kernels = xp.where(squares > 0, xp.sqrt(xp.where(squares > 0, squares, 1.0)), 0.0)
    else:
        kernels = (x * y).sum(-1)
        if kernel_function.kernel == "sigmoid":
            logistic = 1 / (1 + xp.exp(-s["rate"][..., None] * kernels))
            kernels = s["scale"][..., None] * logistic + s["shift"][..., None]
    d = sum(c * kernels[..., p, :, :] for p, c in enumerate(kernel_function.coefficients))
    if kernel_function.mixed:
        e = xp.exp(d / s["gamma"])
        d = d + s["alpha"] * e / e.sum(-1, keepdims=True) + s["beta"]
    return d


def sparse(a, b, scalars, t, kernel_function, xp=jnp):
    """dW^s, the multiplier a constant."""
    dw = dense(a, b, scalars, kernel_function, xp)
    stop = jax.lax.stop_gradient if xp is jnp else (lambda v: v)
    size, t = stop(xp.abs(dw)), xp.asarray(t)[..., None, None]
    kept = size > t
    multiplier = {
        "released": lambda: size * kept,
        "paper": lambda: xp.maximum(size - t, 0),
        "hard": lambda: kept,
        "none": lambda: 1.0,
    }[kernel_function.mode]()
    return dw * multiplier
