"""AdaLoRA's budget: a number of directions, shared between all matrices by what they matter.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv
2303.10512. With the sensitivities s of all trained numbers (`methods/_importance.py`), direction i of a
matrix has

    S_i = s(e_i) + mean_j s(a_ij) + mean_k s(b_ik)

After t of T steps the budget is, of b_0 directions at first and b_T in the end,

    b(t) = ⌊b_T + (b_0 - b_T)(1 - (t - t_i) / (T - t_i - t_f))³⌋ for t_i < t < T - t_f, then b_T

and e of the b_0 - b(t) directions with the smallest S becomes 0; the last time for good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core.checks import positive
from peftjax.methods._importance import sensitivities
from peftjax.methods._targets import Target
from peftjax.methods._warmups import BetweenWarmups
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.optimizer_state import OptimizerState
from peftjax.transform.transform import Advance, Loss

KEPT = "kept"
"""The slot of the directions that the last allocation kept, or that a matrix has, bool `[*stack, r]`."""
GATE = "gate"
"""The slot of those that are not cut for good."""


@dataclass(frozen=True, kw_only=True)
class Schedule(BetweenWarmups):
    """When directions are cut, and how many are left.

    Attributes:
        target_rank: r of a matrix in the end, on average.

    Raises:
        PeftError: a number is out of its range, or no step is left between the warm-ups.
    """

    target_rank: int

    def __post_init__(self) -> None:
        positive("adalora", "target_rank", self.target_rank)
        positive("adalora", "final_warmup", self.final_warmup)
        self.require_valid("adalora", "allocate_every")

    def measured(self, step: Array, **extra: Any) -> Array:
        """Whether the importance is averaged after this step, the first being 0: not at the last cut."""
        return step + 1 < self.last

    def cut(self, step: Array | int, plan: Sequence[Target]) -> Array:
        """How many of all directions are cut after so many steps."""
        ranks = [target.rank for target in plan for _ in range(int(np.prod(target.stack)))]
        end = min(self.target_rank * len(ranks), sum(ranks))
        steps = np.arange(self.init_warmup, self.last + 1)
        left = (1.0 - (steps - self.init_warmup) / (self.last - self.init_warmup)) ** 3
        cut = sum(ranks) - ((sum(ranks) - end) * left + end).astype(np.int64)
        # The step from which on there are one, two, ... fewer: in integers, so that no rounding counts.
        first = self.init_warmup + np.searchsorted(cut, np.arange(1, sum(ranks) - end + 1))
        return jnp.searchsorted(jnp.asarray(first, jnp.int32), jnp.asarray(step), side="right")


def share_out(schedule: Schedule) -> Advance:
    """Cut the directions that matter least, whenever that is due."""

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
        mean: dict[str, Any] = {}
        deviation: dict[str, Any] = {}
        for averages in optimizer.after():
            mean |= averages.inner_state.mean
            deviation |= averages.inner_state.deviation
        plan = [target for target in frozen.plan if target.path in mean]
        if not plan:
            return frozen, trainable, optimizer
        gates = {target.path: frozen.state[target.path][GATE] for target in plan}
        kept = keep(scores(mean, deviation), gates, schedule.cut(step, plan))
        state, trained = dict(frozen.state), dict(trainable)
        for path, held in kept.items():
            gate = held | (gates[path] & (step < schedule.last))
            state[path] = {**state[path], KEPT: held, GATE: gate}
            e = trained[path]["e"]
            trained[path] = {**trained[path], "e": jnp.where(held, e, jnp.zeros_like(e))}
        return replace(frozen, state=state), trained, optimizer

    return Advance(schedule.due, run, changes=(KEPT, GATE))


def scores(mean: Any, deviation: Any) -> dict[str, Array]:
    """S `[*stack, r]` by path, up to a factor common to all."""
    found = sensitivities(mean, deviation)
    return {path: s["e"] + s["a"].mean(axis=-1) + s["b"].mean(axis=-1) for path, s in found.items()}


def keep(scores: Mapping[str, Array], gates: Mapping[str, Array], cut: Array) -> dict[str, Array]:
    """Which directions are left when so many of all are cut, those first that are cut for good already."""
    flat = jnp.concatenate([jnp.where(gates[path], s, -1.0).reshape(-1) for path, s in scores.items()])
    places = jnp.argsort(jnp.argsort(flat, stable=True))
    ends = np.cumsum([s.size for s in scores.values()])[:-1]
    parts = jnp.split(places >= cut, ends)
    return {path: part.reshape(s.shape) for (path, s), part in zip(scores.items(), parts)}


def ranks(frozen: Frozen) -> dict[str, np.ndarray]:
    """How many directions each weight has, `[*stack]` by path: AdaLoRA's last allocation, or LaMDA++'s.

    Args:
        frozen: of `adalora`, of `lamda` with `ranks`, or of a chain with one of them.

    Examples:
        >>> method = pj.adalora(rank=3, target_rank=2, total_steps=10)
        >>> frozen, _ = method.init(jax.random.key(0), {"up": {"kernel": jnp.ones((4, 8))}})
        >>> {path: int(count) for path, count in pj.adapters.ranks(frozen).items()}
        {'up/kernel': 3}
    """
    found: dict[str, np.ndarray] = {}
    for path, slots in frozen.state.items():
        if KEPT in slots:
            found[path] = np.asarray(np.asarray(slots[KEPT]).sum(axis=-1))
        else:
            own = {name: held for name, held in slots.items() if isinstance(held, Mapping)}
            found |= ranks(Frozen({}, own, ()))
    return found
