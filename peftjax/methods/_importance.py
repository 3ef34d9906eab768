"""How much trained numbers matter, averaged over the steps of a training.

After every step, with the new parameters θ and the gradient g of that step, elementwise,

    I = |θ g|     Ī ← β1 Ī + (1-β1) I     Ū ← β2 Ū + (1-β2) |I - Ī|     sensitivity = Ī Ū

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv
2303.10512.
Ī and Ū are part of the optimizer's state, each of the size of what is measured.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.errors import PeftError
from peftjax.transform.around import Own, require_together


class Importance(NamedTuple):
    """The averages, by path and slot, shaped as what they are of."""

    mean: Any
    deviation: Any


def track_importance(
    caller: str, beta1: float, beta2: float, slots: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """Average the importance of some slots over the steps; the updates stay as they are.

    Of weights that `optax.multi_transform` shares out, those of one group have averages of their own.

    Args:
        caller: for the errors.
        beta1: decay of the average importance.
        beta2: decay of its average deviation.
        slots: the names of the arrays of each weight.

    Raises:
        PeftError: in `update`, without the parameters or with a part of a weight's arrays.
    """

    def of_slots(own: Own) -> dict[str, dict[str, Any]]:
        return {path: {name: held[name] for name in slots} for path, held in own.items()}

    def init(params: Own) -> Importance:
        require_together(caller, params)
        return Importance(*(jax.tree.map(jnp.zeros_like, of_slots(params)) for _ in range(2)))

    def update(
        updates: Own, state: Importance, params: Own | None = None, *, gradients: Own, **extra: Any
    ) -> tuple[Own, Importance]:
        if params is None:
            raise PeftError(
                f"{caller}: the update needs the parameters; call tx.update(grads, state, params)"
            )
        moved = optax.apply_updates(of_slots(params), of_slots(updates))
        return updates, _averages(beta1, beta2, state, moved, of_slots(gradients))

    return optax.GradientTransformationExtraArgs(init, update)


def sensitivities(importance: Any, deviation: Any) -> Any:
    """`Ī Ū` of each number, up to a factor common to all: each average is first scaled by its greatest."""
    greatest = [_inverse_of_greatest(values) for values in (importance, deviation)]
    return jax.tree.map(lambda i, u: (i * greatest[0]) * (u * greatest[1]), importance, deviation)


def _averages(beta1: float, beta2: float, state: Importance, moved: Any, grads: Any) -> Importance:
    """The averages after a step to `moved` by `grads`; NaN counts as unimportant."""

    def now(theta: Array, grad: Array) -> Array:
        product = jnp.abs(theta * grad)
        return jnp.where(jnp.isnan(product), 0.0, product)

    found = jax.tree.map(now, moved, grads)
    mean = jax.tree.map(lambda old, i: beta1 * old + (1.0 - beta1) * i, state.mean, found)
    deviation = jax.tree.map(
        lambda old, i, mean: beta2 * old + (1.0 - beta2) * jnp.abs(i - mean), state.deviation, found, mean
    )
    return Importance(mean, deviation)


def _inverse_of_greatest(values: Any) -> Array:
    greatest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in jax.tree.leaves(values)]))
    return jnp.where(greatest > jnp.finfo(jnp.float32).tiny, 1.0 / greatest, 0.0)
