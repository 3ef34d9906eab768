"""The Fisher information of weights, for what is chosen by it."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.tree import Targets


def fisher_information(
    loss: Callable[[Any, Any], Array],
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
        exclude: the same forms; wins.
        per_example: square the gradient of each example, as a batch of one; else that of each batch, which
            is B times faster and another quantity: the gradients of a batch partly cancel.

    Raises:
        PeftError: nothing is matched, or there is no batch.
    """
    paths = tree.select(params, targets, who="fisher_information", exclude=exclude)
    weights, rest = tree.partition(params, paths)

    @jax.jit
    def add(total: dict[str, Array], weights: dict[str, Array], rest: Any, batch: Any) -> dict[str, Array]:
        def squared(total: dict[str, Array], batch: Any) -> tuple[dict[str, Array], None]:
            gradient = jax.grad(lambda weights: loss(tree.join(rest, weights), batch))(weights)
            square = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), gradient)
            return jax.tree.map(jnp.add, total, square), None

        parts = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 1 if per_example else 0), batch)
        return jax.lax.scan(squared, total, parts)[0]

    total = {path: jnp.zeros(w.shape, jnp.float32) for path, w in weights.items()}
    count = 0
    for batch in batches:
        total, count = add(total, weights, rest, batch), count + 1
    if count == 0:
        raise PeftError("fisher_information: there is no batch; give at least one")
    return total
