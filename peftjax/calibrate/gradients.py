"""Statistics of gradients over a few batches: the mean, and the Fisher information."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, select

Loss = Callable[[Any, Any], Array]
"""`(params, batch) -> loss`, of plain parameters, a scalar."""


def mean_gradient(
    loss: Loss,
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
        exclude: what to leave out, in the same forms; wins over `targets`.

    Raises:
        PeftError: nothing is matched, or there is no batch.
    """
    paths = select(params, targets, caller="mean_gradient", exclude=exclude)
    total, count = _summed("mean_gradient", loss, params, batches, paths, lambda g: g)
    return {path: value / count for path, value in total.items()}


def fisher_information(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    *,
    targets: Targets = ".*",
    exclude: Targets | None = None,
    per_example: bool = True,
) -> dict[str, Array]:
    """The diagonal of the empirical Fisher information, `Σ (d loss / d weight)²`, float32, by path.

    It takes the memory of a gradient and of its sum for all the matched weights at once.

    Args:
        loss: of plain parameters and a batch, a scalar.
        params: the base parameters.
        batches: trees of arrays [B, ...]; LST's authors take 1024 examples of the task.
        targets: as in `lora`, by default all kernels and embeddings.
        exclude: what to leave out, in the same forms; wins over `targets`.
        per_example: square the gradient of each example, as a batch of one; else that of each batch, which
            is B times faster and another quantity: the gradients of a batch partly cancel.

    Raises:
        PeftError: nothing is matched, or there is no batch.
    """
    paths = select(params, targets, caller="fisher_information", exclude=exclude)
    return _summed("fisher_information", loss, params, batches, paths, jnp.square, per_example=per_example)[0]


def _summed(
    caller: str,
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    paths: list[str],
    statistic: Callable[[Array], Array],
    *,
    per_example: bool = False,
) -> tuple[dict[str, Array], int]:
    """The sum of a statistic of the float32 gradients of weights, and the number of batches."""
    weights, rest = tree.partition(params, paths)

    @jax.jit
    def add(total: dict[str, Array], weights: dict[str, Array], rest: Any, batch: Any) -> dict[str, Array]:
        def one(total: dict[str, Array], part: Any) -> tuple[dict[str, Array], None]:
            gradient = jax.grad(lambda weights: loss(tree.join(rest, weights), part))(weights)
            values = jax.tree.map(lambda g: statistic(g.astype(jnp.float32)), gradient)
            return jax.tree.map(jnp.add, total, values), None

        if not per_example:
            return one(total, batch)[0]
        return jax.lax.scan(one, total, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 1), batch))[0]

    total = {path: jnp.zeros(w.shape, jnp.float32) for path, w in weights.items()}
    count = 0
    for batch in batches:
        total, count = add(total, weights, rest, batch), count + 1
    if count == 0:
        raise PeftError(f"{caller}: there is no batch; give at least one")
    return total, count
