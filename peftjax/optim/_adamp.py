"""AdamP: Adam without the radial part of its step on scale-invariant weights (see `radial.py`).

Heo et al., ICLR 2021, arXiv 2006.08217, as released. For every parameter W with gradient G, at step t,

    m ← b1 m + (1 - b1) G     v ← b2 v + (1 - b2) G²
    D = m / (1 - b1ᵗ) / (√v / √(1 - b2ᵗ) + eps)              nesterov: b1 m + (1 - b1) G instead of m
    W ← W - lr (projected D + ratio wd W)

With `delta=0` it is AdamW. Defaults are those of the release. It helps where normalizations follow weights,
as in convolutional networks; few weights of a pre-norm transformer are scale-invariant.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from peftjax.optim.adam_moments import correction, next_moments, zero_moments
from peftjax.optim.radial import remove_radial
from peftjax.optim.updates import widened


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    *,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    nesterov: bool = False,
    layouts: Mapping[str, str] | None = None,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamP (equations above).

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the average gradient.
        b2: decay of the average squared gradient.
        eps: added to √v and to norms.
        weight_decay: decoupled, times the learning rate.
        delta: how near to zero a cosine must be for the projection.
        wd_ratio: the share of the decay that a projected matrix has.
        nesterov: Nesterov's momentum in the released form, which is not NAdam's.
        layouts: axes by the end of a name, where it does not tell them.
        state_dtype: of m and v in the state; the parameter's own without it.

    Raises:
        PeftError: a layout does not fit or is not used, or an update without the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.adamp(1e-2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    direction = _adam(b1, b2, eps, nesterov, state_dtype)
    projected = remove_radial(
        direction,
        delta=delta,
        eps=eps,
        weight_decay=weight_decay,
        wd_ratio=wd_ratio,
        layouts=layouts,
        caller="adamp",
    )
    return optax.chain(projected, optax.scale_by_learning_rate(learning_rate))


def _adam(
    b1: ArrayLike, b2: ArrayLike, eps: ArrayLike, nesterov: bool, state_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    def init(params: Any) -> optax.ScaleByAdamState:
        return zero_moments(params, state_dtype)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        mu, nu, state = next_moments(grads, state, b1, b2)
        of_mu, of_nu = correction(b1, state.count), jnp.sqrt(correction(b2, state.count))

        def direction(g: Array, m: Array, v: Array) -> Array:
            ahead = b1 * m + (1 - b1) * widened(g) if nesterov else m
            return (ahead / of_mu / (jnp.sqrt(v) / of_nu + eps)).astype(g.dtype)

        return jax.tree.map(direction, grads, mu, nu), state

    return optax.GradientTransformation(init, update)
