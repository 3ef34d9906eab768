"""What SNELL and SNELLA share: factors, their start, thresholds, and the weight they make."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.kernels.kernelized_merge import KernelFunction, threshold
from peftjax.methods._targets import Target, all_layers, find_targets, key_for, keys_of_matrices
from peftjax.methods.sparse._budget import LEVEL
from peftjax.transform.around import Around
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Advance, Transform
from peftjax.weights.kernelized import Kernelized

_WHERE = ("rank", "targets", "exclude", "layers", "layers_pattern", "rank_pattern", "layouts")


@dataclass(frozen=True, kw_only=True)
class KernelizedTarget(Target):
    """A target with the function from its factors to its update, and the share pruned at the start."""

    kernel_function: KernelFunction
    sparsity: float


def kernelized(
    name: str,
    options: Mapping[str, Any],
    kernel_function_of: Callable[[Target], tuple[KernelFunction, float]],
    *,
    check: Callable[[list[str]], None] | None = None,
    start_of_scalars: Mapping[str, float],
    around: Around | None = None,
    advances: tuple[Advance, ...] = (),
) -> Transform:
    """A method whose weights are `base + dW^s(a, b)`, as a `Transform`.

    Args:
        name: the method's name.
        options: all of them, checked.
        kernel_function_of: the kernel function of a target and the share that is pruned at the start.
        check: called with the paths of the targets before anything is computed; raises for what does not fit.
        start_of_scalars: the start of the kernel function's trained scalars.
        around: what it does around the optimizer.
        advances: what it does to itself before steps.

    Raises:
        PeftError: in `init`, for targets, ranks or layers that do not fit the parameters.
    """
    where = {option: options[option] for option in _WHERE}
    heads, dropout = options["heads"], options["dropout"]

    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        targets = find_targets(params, caller=name, **where)
        if check is not None:
            check([target.path for target in targets])
        plan, trainable, state = [], {}, {}
        for found in targets:
            if found.rank % heads:
                raise PeftError(
                    f"{name}: rank {found.rank} of {found.path!r} does not split into {heads} heads; "
                    "choose a multiple"
                )
            kernel_function, sparsity = kernel_function_of(found)
            target = KernelizedTarget(**vars(found), kernel_function=kernel_function, sparsity=sparsity)
            level = (
                {}
                if kernel_function.mode == "none"
                else {LEVEL: jnp.full(target.stack, sparsity, jnp.float32)}
            )
            scalars = {
                s: jnp.full(target.stack, start_of_scalars[s], jnp.float32) for s in kernel_function.scalars
            }
            factors = start_uniform(key_for(key, target.path), target, heads)
            trainable[target.path] = {**factors, **scalars}
            state[target.path] = level
            plan.append(target)
        return Frozen(params, state, tuple(plan)), trainable

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        leaves = tree.named_leaves(frozen.params)
        rewritten = {}
        for target in frozen.plan:
            slots = {**frozen.state[target.path], **trainable[target.path]}
            keys = keys_of_matrices(key, target) if dropout > 0.0 else None
            rewritten[target.path] = _weight(leaves[target.path], target, slots, dropout, keys)
        return tree.replace(frozen.params, rewritten)

    return Transform(name, options, init, apply, around=around, advances=advances)


def start_uniform(key: Array, target: Target, heads: int) -> dict[str, Array]:
    """Both factors `[*stack, heads, q, n or m]`, `U(-1/√(n q), 1/√(n q))` and likewise with m, float32.

    This is what PyTorch's kaiming_uniform_(a=√5) makes of the authors' arrays `[heads, n, q]`.
    """
    q = target.rank // heads
    factors = {}
    for name, own_key, size in zip("ab", jax.random.split(key), target.layout.matrix):
        bound = 1.0 / math.sqrt(size * q)
        shape = (*target.stack, heads, q, size)
        factors[name] = jax.random.uniform(own_key, shape, minval=-bound, maxval=bound)
    return factors


def _weight(
    leaf: Any, target: KernelizedTarget, slots: Mapping[str, Array], dropout: float, key: Array | None
) -> Kernelized:
    """The weight of a target; layers of its stack that are not trained have an update of zero."""
    scalars = {name: slots[name] for name in target.kernel_function.scalars}
    t = None
    if target.kernel_function.mode != "none":
        level = jnp.clip(slots[LEVEL], 0.0, 1.0)
        t = all_layers(thresholds(slots["a"], slots["b"], scalars, level, target.kernel_function), target)
    # Factors of zero are at distance zero; with these scalars every one makes zeros of them.
    spread = [all_layers(v, target, 1.0 if name == "gamma" else 0.0) for name, v in scalars.items()]
    return Kernelized(
        leaf,
        all_layers(slots["a"], target),
        all_layers(slots["b"], target),
        target.layout,
        target.kernel_function,
        jnp.stack(spread, axis=-1) if spread else None,
        t,
        dropout if key is not None else 0.0,
        key,
    )


@partial(jax.jit, static_argnums=4)
def thresholds(
    a: Array, b: Array, scalars: Mapping[str, Array], level: Array, kernel_function: KernelFunction
) -> Array:
    """A threshold for each matrix of the stack, one after the other: one update exists at a time."""
    operands = lax.stop_gradient((a, b, dict(scalars), level))
    stack = level.shape
    if not stack:
        return threshold(*operands, kernel_function)
    flat = jax.tree.map(lambda value: value.reshape(-1, *value.shape[len(stack) :]), operands)
    return lax.map(lambda one: threshold(*one, kernel_function), flat).reshape(stack)
