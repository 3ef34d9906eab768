"""The optax optimizer of a training run."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from peftjax.optim._eight_bit import eight_bit
from peftjax.train.config import TrainConfig

_Make = Callable[[optax.Schedule, TrainConfig], optax.GradientTransformation]

_OPTIMIZERS: dict[str, _Make] = {
    "adamw": lambda rate, config: optax.adamw(rate, weight_decay=config.weight_decay),
    "adam": lambda rate, _: optax.adam(rate),
    "sgd": lambda rate, _: optax.sgd(rate, momentum=0.9),
    "lion": lambda rate, config: optax.lion(rate, weight_decay=config.weight_decay),
    "adamw8bit": lambda rate, config: eight_bit(optax.adamw(rate, weight_decay=config.weight_decay)),
    "lion8bit": lambda rate, config: eight_bit(optax.lion(rate, weight_decay=config.weight_decay)),
    # Adapters start at zero: a rate relative to the size of a parameter would never leave it.
    "adafactor": lambda rate, _: optax.adafactor(rate, multiply_by_parameter_scale=False),
}


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer with its schedule over `steps` steps."""
    optimizer = _OPTIMIZERS[config.optimizer](learning_rate(config, steps), config)
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """The learning rate of step t = 0, 1, ..., steps - 1, with w warm-up steps and peak η:

    η min(1, (t + 1) / w) f(p),  p = max(0, (t - w) / (steps - w)),
    f = 1 (constant), 1 - p (linear), (1 + cos πp) / 2 (cosine).

    No step has a rate of zero: the first warm-up step has η/w, the last step has p < 1.
    """
    warmup = round(config.warmup_ratio * steps)
    decay = {
        "constant": lambda part: 1.0,
        "linear": lambda part: 1.0 - part,
        "cosine": lambda part: 0.5 * (1.0 + jnp.cos(jnp.pi * part)),
    }[config.schedule]

    def rate(count: Int[Array, ""] | int) -> Float[Array, ""]:
        rise = jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        part = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return config.learning_rate * rise * decay(part)

    return rate
