"""Adam whose step count belongs to each row of each array, and the reset of chosen rows.

    n ← n + 1       m ← β1 m + (1-β1) g       v ← β2 v + (1-β2) g²       n [..., rows, 1]
    update = m / (1-β1ⁿ) / (√(v / (1-β2ⁿ)) + ε)

Where a method sets rows of the moments back to zero (SwitchLoRA, low-rank restarts), one count for all
corrects the new moments as if they were old, and their first updates are (1-β1) / √(1-β2) times too large,
3.2 with the usual betas. Here the count is reset with them. It also counts the steps of a row whose gradient
is held at zero, as the released SwitchLoRA does. Without any reset this is `optax.scale_by_adam`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.transform.moments import Change


class RowAdamState(NamedTuple):
    """The state of `scale_by_row_adam`."""

    count: Any  # [..., rows, 1] int32; of a vector [1], of a scalar []
    mu: Any  # as the parameters
    nu: Any  # as the parameters


def scale_by_row_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Rescale by Adam with a step count for each row, the last axis being the row's own.

    Args:
        b1: β1.
        b2: β2.
        eps: ε, outside the root.
    """

    def init(params: Any) -> RowAdamState:
        count = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1)[: p.ndim], jnp.int32), params)
        return RowAdamState(count, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(grads: Any, state: RowAdamState, params: Any = None) -> tuple[Any, RowAdamState]:
        # Counted before it is divided by: 1 - βⁿ is never zero, right after a reset neither.
        count = jax.tree.map(lambda n: n + 1, state.count)
        mu = jax.tree.map(lambda m, g: (b1 * m + (1.0 - b1) * g).astype(m.dtype), state.mu, grads)
        nu = jax.tree.map(lambda v, g: (b2 * v + (1.0 - b2) * g * g).astype(v.dtype), state.nu, grads)

        def scaled(m: Array, v: Array, n: Array, g: Array) -> Array:
            m, v = m / (1.0 - b1 ** n.astype(jnp.float32)), v / (1.0 - b2 ** n.astype(jnp.float32))
            return (m / (jnp.sqrt(v) + eps)).astype(g.dtype)

        return jax.tree.map(scaled, mu, nu, count, grads), RowAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def row_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """AdamW with a step count for each row.

    Args:
        learning_rate: a number or a schedule.
        b1: β1.
        b2: β2.
        eps: ε, outside the root.
        weight_decay: decoupled, times the learning rate.
        mask: which parameters decay, as in `optax.adamw`.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}}
        >>> tx = pj.optim.row_adamw(1e-2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["up"]["kernel"].shape
        (8, 16)
    """
    return optax.chain(
        scale_by_row_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def zero_rows(rows: Array, *, caller: str) -> Change:
    """For `change_moments`: what belongs to some rows of an array is set to zero.

    Moments have the array's shape, counts and factored moments a number for each row; a float array that
    rows share (Adafactor's over columns) stays as it is.

    Args:
        rows: `[*stack, r]` truth values, of an array `[*stack, r, n]`.
        caller: the method, for the error.

    Raises:
        PeftError: when called on integers that are no count, such as quantized moments of others than
            `eight_bit`.
    """

    def zero(field: str, values: Array) -> Array:
        if not field.endswith(".count") and not jnp.issubdtype(values.dtype, jnp.floating):
            raise PeftError(
                f"{caller}: the optimizer keeps {field or 'its state'!r} as {values.dtype}, whose rows "
                "cannot be reset; use an optimizer with floating-point moments"
            )
        if values.shape[: rows.ndim] != rows.shape or values.ndim > rows.ndim + 1:
            return values
        where = rows.reshape(*rows.shape, *(1,) * (values.ndim - rows.ndim))
        return jnp.where(where, jnp.zeros((), values.dtype), values)

    return zero
