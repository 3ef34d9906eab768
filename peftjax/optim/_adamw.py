"""AdamW as GaLore was released with it: the former AdamW of Hugging Face's transformers.

"GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", Zhao et al., ICML 2024, arXiv
2403.03507. For every parameter W with gradient G, at step t = 1, 2, ...

    m ← b1 m + (1 - b1) G     v ← b2 v + (1 - b2) G²     N = m / (√v + eps)
    W ← W - lr √(1 - b2ᵗ) / (1 - b1ᵗ) N
    W ← W - lr wd W                                        with the W of the line before

`optax.adamw` has eps after the bias correction, `√(v / (1 - b2ᵗ)) + eps`: its eps is 1 / √(1 - b2ᵗ) times
as large against the same gradient (31.6 at t = 1 for b2 = 0.999); and it decays the W from before the step.

State: m and v in the parameter's dtype or in `state_dtype`; computed in float32 or wider.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from peftjax.core.checks import one_of
from peftjax.core.errors import PeftError
from peftjax.optim.adam_moments import correction, next_moments, zero_moments
from peftjax.optim.updates import require_params, widened


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    *,
    order: Literal["released", "optax"] = "released",
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with eps outside the bias correction and a decay of the updated weights (equations above).

    To leave parameters out of the decay, chain the two pieces with `optax.scale_by_learning_rate` between
    them and `optax.masked` around the second.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the average gradient.
        b2: decay of the average squared gradient.
        eps: added to √v.
        weight_decay: of the updated weights, times the learning rate.
        order: 'released', or 'optax' for exactly `optax.adamw` with these numbers.
        state_dtype: of m and v in the state; for 'released' only.

    Raises:
        PeftError: the order is neither, or has no `state_dtype`.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.adamw(1e-2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    if order == "optax":
        if state_dtype is not None:
            raise PeftError("adamw: optax.adamw keeps v in the parameters' dtype; leave out state_dtype")
        return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    one_of("adamw", "order", order, ("released", "optax"))
    return optax.chain(
        scale_by_released_adam(b1, b2, eps, state_dtype=state_dtype),
        optax.scale_by_learning_rate(learning_rate),
        decay_updated_weights(learning_rate, weight_decay),
    )


def scale_by_released_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    *,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """`√(1 - b2ᵗ) / (1 - b1ᵗ) · m / (√v + eps)`, in the gradient's shape and dtype (arXiv 2403.03507).

    Args:
        b1: decay of the average gradient m.
        b2: decay of the average squared gradient v.
        eps: added to √v.
        state_dtype: of m and v in the state; by default the parameter's own.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return zero_moments(params, state_dtype)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        mu, nu, state = next_moments(grads, state, b1, b2)
        factor = jnp.sqrt(correction(b2, state.count)) / correction(b1, state.count)

        def scaled(g: Array, m: Array, v: Array) -> Array:
            return (factor * m / (jnp.sqrt(v) + eps)).astype(g.dtype)

        return jax.tree.map(scaled, grads, mu, nu), state

    return optax.GradientTransformation(init, update)


class DecayState(NamedTuple):
    """The state of `decay_updated_weights`."""

    count: Array
    """Steps done, int32 `[]`: the argument of a schedule."""


def decay_updated_weights(
    learning_rate: optax.ScalarOrSchedule, weight_decay: ArrayLike
) -> optax.GradientTransformation:
    """Decay the updated weights: `u ← u - lr wd (W + u)`, so that `W + u` becomes `(1 - lr wd)(W + u)`.

    The last of a chain: u must already be the step, learning rate and sign included.

    Args:
        learning_rate: the number or schedule of the step itself.
        weight_decay: wd.

    Raises:
        PeftError: an update without the parameters.
    """

    def init(params: Any) -> DecayState:
        return DecayState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: DecayState, params: Any = None) -> tuple[Any, DecayState]:
        require_params(params, "decay_updated_weights")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decay = rate * weight_decay

        def decayed(u: Array, w: Array) -> Array:
            step = widened(u)
            return (step - decay * (widened(w) + step)).astype(u.dtype)

        return jax.tree.map(decayed, updates, params), DecayState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
