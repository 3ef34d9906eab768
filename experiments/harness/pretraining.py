"""The contenders of the pre-training experiments: a method and its optimizer."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import optax

import peftjax as pj
from experiments.harness.contenders import Contender, Setting, adamw
from experiments.harness.per_matrix import STACK_AXES, per_matrix
from experiments.harness.training import Optimizer

BESIDE_LORA = r".*(embedding|norm/scale|head/output/kernel)"
"""What is trained as it is where the matrices of the blocks are not: embedding, norms, output layer."""
Rate = optax.ScalarOrSchedule


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of a run, and the clipping of its gradients."""

    warmup: float = 0.1
    """Share of the steps in which it rises."""
    last: float = 0.1
    """Share of the peak that is left after the last step, along a cosine."""
    clip: float = 1.0
    """Norm to which gradients are clipped as the optimizer is given them: projected ones, or of factors."""

    def rates(self, peak: jax.Array | float, steps: int) -> optax.Schedule:
        """The learning rate by step."""
        rise = max(1, round(self.warmup * steps))
        shape = optax.warmup_cosine_decay_schedule(1 / (rise + 1), 1.0, rise, steps, end_value=self.last)
        return lambda count: peak * shape(count)


def optimizer_of(contender: Contender, setting: Setting, schedule: Schedule | None = None) -> Optimizer:
    """The contender's optimizer of a peak learning rate, clipped and scheduled."""
    schedule = schedule or Schedule()

    def of_peak(peak: jax.Array) -> optax.GradientTransformation:
        rates = schedule.rates(peak, setting.steps)
        clip = optax.clip_by_global_norm(schedule.clip)
        return optax.chain(clip, contender.optimizer(setting, rates))

    return of_peak


def full(setting: Setting) -> pj.Transform:
    """All parameters."""
    return pj.full()


def with_rest(method: pj.Transform) -> pj.Transform:
    """A method of the blocks' matrices, and plain training of all else."""
    return pj.chain(method, pj.unfreeze(BESIDE_LORA))


def lora(setting: Setting) -> pj.Transform:
    """LoRA of scale 1."""
    return with_rest(pj.lora(rank=setting.rank, alpha=setting.rank))


def galore(setting: Setting, **options: Any) -> pj.Transform:
    """GaLore with other options, bases by singular value decomposition if they name none."""
    sizes = {"rank": setting.rank, "every": setting.every, "scale": setting.scale}
    return pj.galore(**sizes, **{"basis": "svd", **options})


def natural_galore(setting: Setting, **options: Any) -> pj.Transform:
    """Natural GaLore with other options; bases as in `galore`."""
    sizes = {"rank": setting.rank, "every": setting.every, "scale": setting.scale}
    return pj.natural_galore(**sizes, **{"basis": "svd", **options})


def restarts(setting: Setting) -> pj.Transform:
    """Low-rank restarts."""
    return pj.lowrank_restarts(rank=setting.rank, every=setting.every)


def switchlora(setting: Setting) -> pj.Transform:
    """SwitchLoRA, whose exchanges have a rhythm of their own."""
    return pj.switchlora(total_steps=setting.steps, rank=setting.rank)


def optax_galore(setting: Setting, rate: Rate) -> optax.GradientTransformation:
    """`optax.contrib.galore`, each matrix by itself."""
    return per_matrix(rate, rank=setting.rank, every=setting.every, scale=setting.scale)


def scaled_matrices(setting: Setting, rate: Rate) -> optax.GradientTransformation:
    """AdamW whose steps of the blocks' matrices are scaled as those of projected methods are.

    The control for what is not the projection: GaLore's learning rate is another one for the matrices than
    for embedding, norms and output layer.
    """

    def scaled(updates: dict[str, jax.Array], _: Any) -> dict[str, jax.Array]:
        return {path: setting.scale * u if u.ndim == STACK_AXES else u for path, u in updates.items()}

    return optax.chain(adamw(setting, rate), optax.stateless(scaled))


def adamw8bit(setting: Setting, rate: Rate) -> optax.GradientTransformation:
    """AdamW with moments of eight bits."""
    return pj.optim.eight_bit(adamw(setting, rate))


def lion8bit(setting: Setting, rate: Rate) -> optax.GradientTransformation:
    """Lion with momentum of eight bits."""
    return pj.optim.eight_bit(optax.lion(rate, weight_decay=0.0))


def row_adamw(setting: Setting, rate: Rate) -> optax.GradientTransformation:
    """AdamW with a step count for each row, as SwitchLoRA's authors use it."""
    return pj.optim.row_adamw(rate, weight_decay=0.0)


CONTENDERS = (
    Contender("AdamW", full),
    Contender("AdamW, matrices scaled", full, scaled_matrices),
    Contender("8-bit AdamW", full, adamw8bit),
    Contender("GaLore", galore),
    Contender("8-bit GaLore", galore, adamw8bit),
    Contender("GaLore, moments rotated", partial(galore, moments="rotate")),
    Contender("GaLore, moments reset", partial(galore, moments="reset")),
    Contender("Natural GaLore", natural_galore),
    Contender("optax.contrib.galore", full, optax_galore),
    Contender("LoRA", lora),
    Contender("low-rank restarts", restarts),
    Contender("SwitchLoRA", switchlora, row_adamw),
)
