"""The vectors that SwitchLoRA exchanges: how many in a step, which ones, and the change of the weight.

    θ(t) = 0.3^((t+1) / T0),   T0 = decay · T         expected number a matrix and step: r θ(t) / interval

rounded up or down at random, for each matrix of every stack. Counting the exchanges so far by c, the rows
c, c+1, ... (mod r) of `a` and the rows c + r//2, ... of `b` are next; each is exchanged with the place
c, c+1, ... (mod the pool's size) of its pool. That is the released order: there every pool has the live
vectors too, in a window that moves along, and what leaves the window is the last to come back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.transform.around import Own, require_given, require_together
from peftjax.transform.frozen import Frozen

Slots = Mapping[str, Array]
FACTORS = ("a", "b")
"""What is trained of a weight."""
HELD = ("weight", "pool_a", "pool_b", "frozen_a", "frozen_b", "switched")
"""What is held of it, and changed by a switch."""


@dataclass(frozen=True)
class Schedule:
    """How often vectors are exchanged.

    Attributes:
        interval: steps between two exchanges of one vector, at first.
        decay: T0 as a share of the run; at step T0 there are 0.3 times as many exchanges as at first.
        total_steps: T.
        freeze_steps: for how many steps the counterpart of a new vector is not trained.

    Raises:
        PeftError: a number is out of its range.
    """

    interval: float
    decay: float
    total_steps: int
    freeze_steps: int

    def __post_init__(self) -> None:
        positive("switchlora", "total_steps", self.total_steps)
        positive("switchlora", "decay", self.decay)
        at_least("switchlora", "freeze_steps", self.freeze_steps, 0)
        least = max(1, 2 * self.freeze_steps)
        if self.interval < least:
            raise PeftError(
                f"switchlora: interval must be at least {least}, twice freeze_steps, got {self.interval}: "
                "a vector cannot be exchanged while its counterpart was just frozen"
            )

    def expected(self, rank: int, step: Array | int) -> Array:
        """The expected number of exchanges in a matrix before the step, counted from 0; float32."""
        after = (jnp.asarray(step, jnp.float32) + 1.0) / (self.decay * self.total_steps)
        return rank / self.interval * 0.3**after

    def most(self, rank: int) -> int:
        """The largest number of exchanges in a step."""
        return min(rank // 2, math.floor(rank / self.interval) + 1)


class Switched(NamedTuple):
    """A matrix after its exchanges."""

    slots: dict[str, Array]  # all but the weight
    left: Array  # [2 k, in]: the weight changes by scale · leftᵀ right
    right: Array  # [2 k, out]
    reset_a: Array  # [r], true at the rows of `a` that are new counterparts
    reset_b: Array  # [r]


def number(schedule: Schedule, key: Array, step: Array, slots: Slots) -> Array:
    """How many vectors of `a`, and of `b`, of one matrix are exchanged; int32.

    As many as are expected, rounded at random; never so many that a row would be exchanged whose counterpart
    was, within the steps of its freeze, nor more than the pools have.
    """
    rank, places = slots["a"].shape[0], slots["pool_a"].shape[0]
    expected = schedule.expected(rank, step)
    whole = jnp.floor(expected)
    wanted = whole + jax.random.bernoulli(key, expected - whole)
    free = rank // 2 - jnp.sum(slots["frozen_a"] > 0)
    return jnp.clip(jnp.minimum(wanted, jnp.minimum(free, places)), 0).astype(jnp.int32)


def switch(schedule: Schedule, slots: Slots, count: Array) -> Switched:
    """One matrix with `count` rows of `a`, then of `b`, exchanged with their pools.

    Args:
        schedule: for the largest count, and how long a counterpart is frozen.
        slots: `a [r, in]`, `b [r, out]`, their pools, `frozen_a [r]`, `frozen_b [r]`, `switched []`.
        count: how many, int32.
    """
    a, b, rank, places = slots["a"], slots["b"], slots["a"].shape[0], slots["pool_a"].shape[0]
    most = min(schedule.most(rank), places)
    done, each = slots["switched"], jnp.arange(most)
    on = each < count
    in_a, in_b, place = (done + each) % rank, (done + rank // 2 + each) % rank, (done + each) % places

    def exchanged(live: Array, pool: Array, rows: Array) -> tuple[Array, Array, Array]:
        """The factor, its pool, and the old rows minus the new ones."""
        old, new = live[rows], pool[place]
        now = jnp.where(on[:, None], new, old)
        back = jnp.where(on[:, None], old, new)
        return live.at[rows].set(now), pool.at[place].set(back), old - now

    new_a, pool_a, lost_a = exchanged(a, slots["pool_a"], in_a)
    new_b, pool_b, lost_b = exchanged(b, slots["pool_b"], in_b)
    reset_a = jnp.zeros(rank, bool).at[in_b].set(on)
    reset_b = jnp.zeros(rank, bool).at[in_a].set(on)
    after = {
        "a": new_a,
        "b": new_b,
        "pool_a": pool_a,
        "pool_b": pool_b,
        "frozen_a": jnp.where(reset_a, schedule.freeze_steps, slots["frozen_a"]),
        "frozen_b": jnp.where(reset_b, schedule.freeze_steps, slots["frozen_b"]),
        "switched": slots["switched"] + count,
    }
    # The rows of the two halves are distinct, so that `b` at the one is as before and `a` at the other too.
    left = jnp.concatenate([lost_a, a[in_b]])
    right = jnp.concatenate([b[in_a], lost_b])
    return Switched(after, left, right, reset_a, reset_b)


def thawed(slots: Slots) -> dict[str, Array]:
    """The slots with one step less to go for each frozen row."""
    left = {name: jnp.maximum(slots[name] - 1, 0) for name in ("frozen_a", "frozen_b")}
    return {**slots, **left}


def hold_frozen_rows() -> optax.GradientTransformationExtraArgs:
    """Zero at the rows of `a` and `b` that are not trained for now."""

    def init(params: Own) -> optax.EmptyState:
        require_together("switchlora", params)
        return optax.EmptyState()

    def update(
        values: Own, state: Any, params: Own | None = None, *, frozen: Frozen | None = None, **extra: Any
    ) -> tuple[Own, Any]:
        held = require_given("switchlora", params, frozen).state
        return {path: _held(slots, held.get(path, {})) for path, slots in values.items()}, state

    return optax.GradientTransformationExtraArgs(init, update)


def _held(values: Slots, held: Slots) -> dict[str, Array]:
    live = {name: held[f"frozen_{name}"][..., None] == 0 for name in FACTORS if f"frozen_{name}" in held}
    return {name: jnp.where(live[name], v, 0.0) if name in live else v for name, v in values.items()}
