"""Learning rates that begin anew whenever a method does."""

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from peftjax.core.checks import at_least, positive, positive_share
from peftjax.core.errors import PeftError


def cosine_with_restarts(
    peak: ArrayLike,
    *,
    total_steps: int,
    every: int,
    warmup_steps: int,
    restart_warmup_steps: int = 100,
    least: float = 0.1,
) -> optax.Schedule:
    """One cosine over the whole training, with a short warm-up after each restart (ReLoRA, arXiv 2307.05695).

        c(p) = least + (1 - least) (1 + cos(π p)) / 2      L = total_steps - warmup_steps, u = t mod every
        peak · t / warmup_steps                                      t < warmup_steps
        peak · u / restart_warmup_steps · c((t - u) / L)             else, and u < restart_warmup_steps
        peak · c((t - warmup_steps) / L)                             else

    Args:
        peak: the largest rate.
        total_steps: of the training.
        every: steps between two restarts.
        warmup_steps: at the beginning.
        restart_warmup_steps: after each restart.
        least: the share of the peak at the end.

    Raises:
        PeftError: for a number out of range.

    Examples:
        >>> steps = {"total_steps": 100, "every": 20, "warmup_steps": 10, "restart_warmup_steps": 4}
        >>> rate = pj.optim.cosine_with_restarts(1.0, **steps)
        >>> [round(float(rate(step)), 2) for step in (5, 10, 40, 42, 44)]
        [0.5, 1.0, 0.0, 0.31, 0.72]
    """
    for name, value in (("total_steps", total_steps), ("every", every)):
        positive("cosine_with_restarts", name, value)
    for name, value in (("warmup_steps", warmup_steps), ("restart_warmup_steps", restart_warmup_steps)):
        at_least("cosine_with_restarts", name, value, 0)
    positive_share("cosine_with_restarts", "least", least)
    if warmup_steps >= total_steps:
        raise PeftError(
            f"cosine_with_restarts: a warm-up of {warmup_steps} steps leaves none of {total_steps}; lower "
            "warmup_steps"
        )
    length = total_steps - warmup_steps

    def cosine(progress: Array) -> Array:
        return least + (1.0 - least) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    def rate(step: ArrayLike) -> Array:
        t = jnp.asarray(step, jnp.float32)
        u = jnp.mod(t, every)
        restarted = u / max(1, restart_warmup_steps) * cosine((t - u) / length)
        falling = jnp.where(u < restart_warmup_steps, restarted, cosine((t - warmup_steps) / length))
        return peak * jnp.where(t < warmup_steps, t / max(1, warmup_steps), falling)

    return rate
