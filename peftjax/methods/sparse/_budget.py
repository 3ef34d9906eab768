"""SNELLA's budget: a number of kept weights, shared between matrices by importance.

Shen et al., "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025,
arXiv 2510.24037. After every step, with the new parameters θ and the gradient g of that step,

    I = |θ g|     Ī ← β1 Ī + (1-β1) I     Ū ← β2 Ū + (1-β2) |I - Ī|     for both factors, elementwise
    score_l = mean(Ī Ū over a_l) + mean(Ī Ū over b_l)                    one per matrix l of every stack

Before epoch e = w_i + 1, ... of E (an epoch is `allocate_every` steps) the volume is shared out:

    kept(e) = kept_end + (kept_start - kept_end)(1 - (e - w_i) / (E - w_f - w_i))³,    kept = 1 - sparsity
    v_l = min(n_l m_l, λ score_l),  Σ_l v_l = kept(e) Σ_l n_l m_l,  level_l = 1 - v_l / (n_l m_l)

Ī and Ū are part of the optimizer's state, the levels of `frozen.state`. `docs/methods/snella.md` has the
differences from the released allocator.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array

from peftjax.core.checks import at_least, fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods.sparse._allocation import allocate, capacities, scores
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Advance, Loss

LEVEL = "sparsity"
"""The slot of a matrix's level, beside its factors `a` and `b`."""


@dataclass(frozen=True)
class Budget:
    """How much may be kept, and when.

    Attributes:
        sparsity: the share that is pruned in the end, over all matrices together.
        initial_sparsity: the share at the start, in every matrix.
        total_steps: steps of the whole training.
        allocate_every: steps between two allocations.
        init_warmup: allocations at the beginning that are left out.
        final_warmup: epochs at the end that have the target.
        beta1: decay of the average importance.
        beta2: decay of its average deviation.

    Raises:
        PeftError: a number is out of its range, or no allocation is left.
    """

    sparsity: float
    initial_sparsity: float
    total_steps: int
    allocate_every: int
    init_warmup: int = 0
    final_warmup: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("sparsity", "initial_sparsity", "beta1", "beta2"):
            fraction("budget", name, getattr(self, name))
        for name in ("total_steps", "allocate_every"):
            positive("budget", name, getattr(self, name))
        for name in ("init_warmup", "final_warmup"):
            at_least("budget", name, getattr(self, name), 0)
        if self.epochs - self.final_warmup - self.init_warmup < 1:
            raise PeftError(
                f"budget: {self.epochs} epochs of {self.allocate_every} steps leave no allocation between "
                f"warm-ups of {self.init_warmup} and {self.final_warmup}; lower allocate_every or those"
            )

    @property
    def epochs(self) -> int:
        """E, the last one perhaps shorter."""
        return -(-self.total_steps // self.allocate_every)

    def kept(self, epoch: Array | int) -> Array:
        """The share of all weights that is kept in an epoch, float32."""
        span = self.epochs - self.final_warmup - self.init_warmup
        part = jnp.clip((jnp.asarray(epoch) - self.init_warmup) / span, 0.0, 1.0)
        start, end = 1.0 - self.initial_sparsity, 1.0 - self.sparsity
        return jnp.asarray(end + (start - end) * (1.0 - part) ** 3, jnp.float32)


def share_out(budget: Budget) -> Advance:
    """Set the level of every matrix before each epoch of the budget that has an allocation."""

    def due(step: int) -> bool:
        epoch, rest = divmod(step, budget.allocate_every)
        return rest == 0 and budget.init_warmup < epoch < budget.epochs

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
        kept, held = budget.kept(step // budget.allocate_every), dict(frozen.state)
        for averages in optimizer.after():
            if averages.mean:  # not where all weights are another optimizer's
                sizes = capacities(averages.mean)
                for path, level in allocate(kept, scores(*averages), sizes).items():
                    held[path] = {**held[path], LEVEL: level}
        return replace(frozen, state=held), trainable, optimizer

    return Advance(due, run, changes=(LEVEL,))
