"""SGDP: SGD with momentum, without the radial part of its step on scale-invariant weights (see `radial.py`).

Heo et al., ICLR 2021, arXiv 2006.08217, as released. For every parameter W with gradient G,

    B ← μ B + (1 - dampening) G,  B = 0 before the first step
    D = B                                                        nesterov: G + μ B
    W ← W - lr (projected D + ratio wd / (1 - μ) W)

The decay is divided by 1 - μ because it does not pass through the momentum. With `delta=0` and no decay it is
`optax.sgd`.

Without Nesterov the released code takes the radial part out of B itself, since its D is B, in place; the next
step starts from the projected momentum. Here, as in the paper, B is kept whole and the step alone is
projected: in tens of steps the two part by some per cent of the way.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from peftjax.optim.radial import remove_radial
from peftjax.optim.updates import widened


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    *,
    dampening: ArrayLike = 0.0,
    nesterov: bool = False,
    eps: ArrayLike = 1e-8,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    layouts: Mapping[str, str] | None = None,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGDP (equations above).

    Args:
        learning_rate: a number or a schedule.
        momentum: μ, below 1.
        weight_decay: decoupled, times the learning rate and 1 / (1 - μ).
        dampening: of the gradient in the momentum.
        nesterov: Nesterov's momentum.
        eps: added to norms.
        delta: how near to zero a cosine must be for the projection.
        wd_ratio: the share of the decay that a projected matrix has.
        layouts: axes by the end of a name, where it does not tell them.
        state_dtype: of the momentum in the state; the parameter's own without it.

    Raises:
        PeftError: a layout does not fit or is not used, or an update without the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.sgdp(1e-2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    projected = remove_radial(
        _momentum(momentum, dampening, nesterov, state_dtype),
        delta=delta,
        eps=eps,
        weight_decay=weight_decay / (1 - momentum),
        wd_ratio=wd_ratio,
        layouts=layouts,
        caller="sgdp",
    )
    return optax.chain(projected, optax.scale_by_learning_rate(learning_rate))


def _momentum(
    momentum: ArrayLike, dampening: ArrayLike, nesterov: bool, state_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(lambda p: jnp.zeros_like(p, state_dtype), params))

    def update(grads: Any, state: optax.TraceState, params: Any = None) -> tuple[Any, optax.TraceState]:
        def moved(g: Array, b: Array) -> Array:
            return momentum * widened(b) + (1 - dampening) * widened(g)

        trace = jax.tree.map(moved, grads, state.trace)
        ahead = jax.tree.map(lambda g, b: g + momentum * b if nesterov else b, grads, trace)
        directions = jax.tree.map(lambda g, d: d.astype(g.dtype), grads, ahead)
        stored = jax.tree.map(lambda b, old: b.astype(old.dtype), trace, state.trace)
        return directions, optax.TraceState(stored)

    return optax.GradientTransformation(init, update)
