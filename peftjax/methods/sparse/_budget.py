"""SNELLA's budget: a number of kept weights, shared between matrices by importance, as an optax hook.

Shen et al., "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025,
arXiv 2510.24037. After every step, with the parameters θ it made and the gradient g it was made from,

    I = |θ g|     Ī ← β1 Ī + (1-β1) I     Ū ← β2 Ū + (1-β2) |I - Ī|     for both factors, elementwise
    score_l = mean(Ī Ū over a_l) + mean(Ī Ū over b_l)                    one per matrix l of every stack

Before epoch e = 1, 2, ... of E (an epoch is `allocate_every` steps) the volume is shared out:

    kept(e) = kept_end + (kept_start - kept_end)(1 - (e - w_i) / (E - w_f - w_i))³,    kept = 1 - sparsity
    v_l = min(n_l m_l, λ score_l),  Σ_l v_l = kept(e) Σ_l n_l m_l,  level_l = 1 - v_l / (n_l m_l)

and nothing changes while e <= w_i. The released allocator (per-layer floors, then a loop that hands out the
rest) has faults that are not repeated here:

- all scores zero: it crashes; here the scores are equal then;
- its loop can run forever when a volume is above 2²⁴, float32's integers; here volumes are shares of the
  whole, and λ comes from one sort, so any size will do;
- scores so small that their product is 0 in float32 look alike; here they are scaled before;
- some scores zero and the others' matrices full: its rest goes nowhere (0/0); here to the matrices left;
- without a final warm-up its last epoch ends short of the target; here the final warm-up is 1 by
  default, with which the last allocation is exactly the target's (0 is the released schedule).

The state (Ī, Ū and the step count) is part of the optimizer's, so that a checkpoint has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from peftjax.core.checks import at_least, fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods.sparse._allocation import allocate, capacities, scores
from peftjax.transform.transform import at_prefix, own_at, require_together

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


class BudgetState(NamedTuple):
    """The state of `share_budget`; importance and deviation by path and factor, shaped as the factors."""

    step: Array
    importance: Any
    deviation: Any
    inner: optax.OptState


def share_budget(
    tx: optax.GradientTransformation, budget: Budget, prefix: tuple[str, ...] = ()
) -> optax.GradientTransformationExtraArgs:
    """Set the level of every matrix by the budget; all else is left to `tx`, which never sees the levels.

    Args:
        tx: the optimizer.
        budget: how much may be kept, and when.
        prefix: where `{path: {"a", "b", "sparsity", ...}}` lies in the trainable; `a` is `[*stack, P, q, n]`,
            `b` is `[*stack, P, q, m]` and the level `[*stack]`. Of weights that
            `optax.multi_transform` shares out, those of one group share a budget.

    Raises:
        PeftError: in `update`, when it is not given the parameters.
    """
    tx = optax.masked(tx, lambda params: _without_levels(params, prefix))

    def init(params: Any) -> BudgetState:
        require_together("budget", own_at(params, prefix))
        zeros = jax.tree.map(jnp.zeros_like, _factors(own_at(params, prefix)))
        again = jax.tree.map(jnp.zeros_like, zeros)
        return BudgetState(jnp.zeros((), jnp.int32), zeros, again, tx.init(params))

    def update(grads: Any, state: BudgetState, params: Any = None, **extra: Any) -> tuple[Any, BudgetState]:
        if params is None:
            raise PeftError("budget: the update needs the parameters; call tx.update(grads, state, params)")
        updates, inner = tx.update(grads, state.inner, params, **extra)
        own = own_at(params, prefix)
        if not own:  # every weight is masked out: another optimizer's
            return updates, state._replace(step=state.step + 1, inner=inner)
        moved = optax.apply_updates(_factors(own), _factors(own_at(updates, prefix)))
        averages = _averages(budget, state, moved, _factors(own_at(grads, prefix)))
        step = state.step + 1
        epoch, rest = step // budget.allocate_every, step % budget.allocate_every
        due = (rest == 0) & (epoch > budget.init_warmup) & (epoch < budget.epochs)
        levels = {path: slots[LEVEL] for path, slots in own.items()}
        new = lax.cond(
            due,
            lambda: allocate(budget.kept(epoch), scores(*averages), capacities(moved)),
            lambda: levels,
        )

        def steer(mine: Mapping[str, Any]) -> dict[str, Any]:
            return {path: {**slots, LEVEL: new[path] - levels[path]} for path, slots in mine.items()}

        return at_prefix(updates, prefix, steer), BudgetState(step, *averages, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _averages(budget: Budget, state: BudgetState, moved: Any, grads: Any) -> tuple[Any, Any]:
    """Importance and deviation after a step to `moved` by `grads`; NaN counts as unimportant."""

    def now(theta: Array, grad: Array) -> Array:
        product = jnp.abs(theta * grad)
        return jnp.where(jnp.isnan(product), 0.0, product)

    found = jax.tree.map(now, moved, grads)
    b1, b2 = budget.beta1, budget.beta2
    importance = jax.tree.map(lambda old, i: b1 * old + (1.0 - b1) * i, state.importance, found)
    deviation = jax.tree.map(
        lambda old, i, mean: b2 * old + (1.0 - b2) * jnp.abs(i - mean), state.deviation, found, importance
    )
    return importance, deviation


def _factors(own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {path: {name: slots[name] for name in ("a", "b")} for path, slots in own.items()}


def _without_levels(params: Any, prefix: tuple[str, ...]) -> Any:
    """A tree of truth values: whether the optimizer inside moves the leaf."""
    return at_prefix(
        jax.tree.map(lambda _: True, params),
        prefix,
        lambda own: {path: {name: name != LEVEL for name in slots} for path, slots in own.items()},
    )
