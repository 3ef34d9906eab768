"""Whether the first step of an optimizer that takes signs is decided by rounding.

Adam's first step is the sign of the gradient. Where a gradient is zero but for rounding, that sign depends on
the order of sums, so on the mesh and on the order of devices, and the step has full size all the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.losses import Batch
from peftjax.train.gradient import gradient_of_batch
from peftjax.train.step import Training, TrainingState

ROUNDINGS = 4.0
"""How many times the usual difference between two orders of rows counts as rounding."""


def uncertain_signs(run: Training, state: TrainingState, batch: Batch) -> dict[str, float]:
    """The share of each trained array's entries whose gradient is nonzero and within rounding of zero.

        0 < |g| <= 4 rms(g - g'),   g' the gradient of the same rows in reverse order

    Args:
        run: the training.
        state: before its first step; nothing is drawn (no dropout).
        batch: the first batch, of two rows or more.

    Returns:
        The shares by the array's name, all of them.

    Raises:
        PeftError: the batch is of one row, of which there is one order only.

    Examples:
        >>> method = pj.lora(rank=2, targets=["w"])
        >>> loss = lambda params, x: jnp.sum(pj.matmul(x, params["w"]) ** 2)
        >>> run = pj.training(method, loss, optax.adam(1e-3))
        >>> state = run.start(jax.random.key(0), {"w": jnp.ones((4, 3))})
        >>> from peftjax.train.first_step import uncertain_signs
        >>> sorted(uncertain_signs(run, state, jnp.ones((2, 4))).items())
        [('w/a', 0.0), ('w/b', 0.0)]
    """
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if min(rows) < 2:
        raise PeftError(
            "uncertain_signs compares two orders of a batch's rows, and there is one row; give two or more"
        )

    @jax.jit
    def gradient(batch: Batch) -> Any:
        return gradient_of_batch(
            run.method, run.loss, run.accumulation, state.trainable, state.frozen, batch, None
        )[0]

    @jax.jit
    def share(one: jax.Array, other: jax.Array) -> jax.Array:
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        rounding = jnp.sqrt(jnp.mean((one - other) ** 2))
        return jnp.mean((one != 0) & (jnp.abs(one) <= ROUNDINGS * rounding))

    gradients = gradient(batch), gradient(jax.tree.map(lambda leaf: leaf[::-1], batch))
    return {name: float(found) for name, found in tree.named_leaves(jax.tree.map(share, *gradients)).items()}
