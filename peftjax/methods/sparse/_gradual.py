"""The cubic schedule of gradual pruning: how many entries of each matrix are pruned, by the step.

Of T steps, the first t_i and the last t_f of which have the two ends, with k_0 pruned at first and k_T in the
end,

    k(t) = k_T + (k_0 - k_T)(1 - (t - t_i) / (T - t_i - t_f))³      for t_i ≤ t ≤ T - t_f

Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import fraction
from peftjax.methods._targets import Target
from peftjax.methods._warmups import BetweenWarmups
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Advance, Loss

PRUNED = "pruned"
"""The slot of the number of pruned entries of each matrix, int32 `[*stack]`."""


@dataclass(frozen=True, kw_only=True)
class Gradual(BetweenWarmups):
    """How much is pruned, and when.

    Attributes:
        sparsity: the share of each matrix that is pruned in the end.
        initial_sparsity: that share at first.

    Raises:
        PeftError: a number is out of its range, or no step is left between the warm-ups.
    """

    sparsity: float
    initial_sparsity: float

    def __post_init__(self) -> None:
        for name in ("sparsity", "initial_sparsity"):
            fraction("pruning", name, getattr(self, name))
        self.require_valid("pruning", "prune_every")

    def pruned(self, step: Array | int, target: Target) -> Array:
        """How many entries of a matrix are pruned at a step, int32: at the ends exactly `⌊share · n·m⌋`."""
        n, m = target.layout.matrix
        first, end = int(self.initial_sparsity * n * m), int(self.sparsity * n * m)
        part = jnp.clip((step - self.init_warmup) / (self.last - self.init_warmup), 0.0, 1.0)
        return end + jnp.round((first - end) * (1.0 - part) ** 3).astype(jnp.int32)


def prune(gradual: Gradual) -> Advance:
    """Set how many entries of each target's matrices are pruned, whenever that changes."""

    def run(
        loss: Loss | None,
        frozen: Frozen,
        trainable: Trainable,
        optimizer: OptimizerState,
        *,
        step: Array,
        key: Array,
        part: int,
    ) -> tuple[Frozen, Trainable, OptimizerState]:
        held = dict(frozen.state)
        for target in frozen.plan:
            own = held[target.path]
            count = jnp.broadcast_to(gradual.pruned(step, target), own[PRUNED].shape)
            held[target.path] = {**own, PRUNED: count}
        return replace(frozen, state=held), trainable, optimizer

    return Advance(gradual.due, run, changes=(PRUNED,))
