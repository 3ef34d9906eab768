"""The gradient of a few batches with respect to weights, for masks that are chosen by it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.tree import Targets


def mean_gradient(
    loss: Callable[[Any, Any], Array],
    params: Any,
    batches: Iterable[Any],
    *,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
) -> dict[str, Array]:
    """The mean over the batches of `d loss(params, batch) / d weight`, float32, by path.

    It takes the memory of a gradient and of its sum for all the matched weights at once.

    Args:
        loss: of plain parameters and a batch, a scalar.
        params: the base parameters.
        batches: a calibration set; more than one pass is not needed.
        targets: as in `lora`; those of the method it is for.
        exclude: the same forms; wins.

    Raises:
        PeftError: nothing is matched, or there is no batch.
    """
    weights, rest = tree.partition(params, tree.select(params, targets, who="mean_gradient", exclude=exclude))

    @jax.jit
    def add(total: dict[str, Array], weights: dict[str, Array], rest: Any, batch: Any) -> dict[str, Array]:
        gradient = jax.grad(lambda weights: loss(tree.join(rest, weights), batch))(weights)
        return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), total, gradient)

    total = {path: jnp.zeros(w.shape, jnp.float32) for path, w in weights.items()}
    count = 0
    for batch in batches:
        total, count = add(total, weights, rest, batch), count + 1
    if count == 0:
        raise PeftError("mean_gradient: there is no batch; give at least one")
    return {path: value / count for path, value in total.items()}
