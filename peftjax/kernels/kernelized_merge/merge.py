"""The three public functions: the update, its threshold, and the sparsified update with its gradient."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import compat
from peftjax.core.derivatives import with_backward
from peftjax.kernels.kernelized_merge import choice
from peftjax.kernels.kernelized_merge.choice import Implementation
from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction, check


def update(
    a: Array,
    b: Array,
    scalars: Mapping[str, Array],
    kernel_function: KernelFunction,
    *,
    implementation: Implementation = "auto",
) -> Array:
    """The update without a sparsifier, float32 `[*stack, n, m]`; differentiable as `sparse_update` is.

    a: `[*stack, P, q, n]`; b: `[*stack, P, q, m]`; scalars: as for `sparse_update`.
    """
    no_threshold = jnp.zeros(a.shape[:-3], jnp.float32)
    unsparsified = replace(kernel_function, mode="none")
    return sparse_update(a, b, scalars, no_threshold, unsparsified, implementation=implementation)


def threshold(
    a: Array,
    b: Array,
    scalars: Mapping[str, Array],
    level: Array,
    kernel_function: KernelFunction,
    *,
    implementation: Implementation = "auto",
) -> Array:
    """The threshold of |dW|, one per matrix, float32 `[*stack]`, not differentiated.

    `released` and `hard`: the quantile of |dW| at `level`, interpolated linearly as torch.quantile does.
    `paper`: the ceil(level·n·m)-th smallest |dW|. `none`: zero, as nothing is pruned. At level 0 it is the
    smallest |dW|, which the strict comparison prunes: whoever wants no sparsifier takes mode `none`.

    a, b, scalars: as for `sparse_update`. level: `[*stack]` in [0, 1], traced: another level compiles
    nothing. Found by selection (`selection.quantile`), so a matrix may have up to 2^31 - 1 entries.
    """
    check(a, b, scalars, level, kernel_function)
    choice.check(implementation)
    if kernel_function.mode == "none":
        return jnp.zeros(level.shape, jnp.float32)
    operands = jax.tree.map(lax.stop_gradient, (a, b, dict(scalars), level))
    return choice.threshold(
        *compat.varying_alike(operands), kernel_function=kernel_function, implementation=implementation
    )


def sparse_update(
    a: Array,
    b: Array,
    scalars: Mapping[str, Array],
    t: Array,
    kernel_function: KernelFunction,
    *,
    implementation: Implementation = "auto",
) -> Array:
    """The sparsified update dW^s, float32 `[*stack, n, m]`.

    a: `[*stack, P, q, n]`, b: `[*stack, P, q, m]`, of P heads and rank q, in any float dtype; computed in
    float32. scalars: `[*stack]` under each name that it has. t: `[*stack]`, from `threshold`.

    The gradient is that of a, b and the scalars; t and the sparsifier's factor are constants. The backward
    pass keeps a, b, the scalars and t, and nothing with n·m elements. Forward mode and higher derivatives
    are those of the reference, t and the factor being constants in them too.

    implementation: see `choice`; `auto` takes a kernel where the program runs on one TPU or GPU.

    Raises `PeftError` where shapes, heads or scalars do not fit the kernel function.
    """
    check(a, b, scalars, t, kernel_function)
    choice.check(implementation)
    # Inside a shard_map, what all devices share is cast first: its gradient is then summed over them.
    return _sparse_update(kernel_function, implementation, *compat.varying_alike((a, b, dict(scalars), t)))


def _sparse_update(kernel_function: KernelFunction, implementation: Implementation, *operands: Any) -> Array:
    def keep(*operands: Any) -> tuple[Array, tuple]:
        return _sparse_update(kernel_function, implementation, *operands), operands

    value = partial(choice.forward, kernel_function=kernel_function, implementation=implementation)
    return with_backward(value, keep, partial(_gradients, kernel_function, implementation))(*operands)


def _gradients(
    kernel_function: KernelFunction, implementation: Implementation, kept: tuple, g: Array
) -> tuple:
    of_a, of_b, of_scalars = choice.backward(
        *kept, g, kernel_function=kernel_function, implementation=implementation
    )
    gradients = (of_a, of_b, of_scalars, jnp.zeros_like(kept[3]))
    return jax.tree.map(lambda gradient, primal: gradient.astype(primal.dtype), gradients, kept)
