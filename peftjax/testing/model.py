"""A small model for checks of methods."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.transform.frozen import Params

KEY = jax.random.key(7)


@dataclass(frozen=True)
class Model:
    """What a method is checked on.

    Attributes:
        forward: `(params, batch) -> outputs`, or a backbone.
        params: its parameters, none of them zeros or ones, so that every comparison can fail.
        batch: inputs.
        name: of the model.
    """

    forward: Callable[..., Any]
    params: Params
    batch: Any
    name: str = "model"

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The model itself, compiled."""
        return jax.jit(self.forward)


def small_model() -> Model:
    """A lookup, two linear layers, a norm's scale and a tied output, of width 8."""
    keys = iter(jax.random.split(KEY, 6))

    def drawn(*shape: int) -> jax.Array:
        return 0.3 * jax.random.normal(next(keys), shape)

    params = {
        "words": {"embedding": drawn(11, 8)},
        "up": {"kernel": drawn(8, 12), "bias": drawn(12)},
        "down": {"kernel": drawn(12, 8)},
        "norm": {"scale": 1.0 + drawn(8)},
    }

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        words = params["words"]["embedding"]
        hidden = jnp.tanh(jnp.take(words, tokens, axis=0) @ params["up"]["kernel"] + params["up"]["bias"])
        hidden = params["norm"]["scale"] * jnp.tanh(hidden @ params["down"]["kernel"])
        return hidden @ words.T

    return Model(forward, params, jax.random.randint(KEY, (2, 5), 0, 11))


def moved(values: Any, seed: int = 0) -> Any:
    """A tree as after some steps of training: every number moved by its own random amount."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * noise.standard_normal(leaf.shape), leaf.dtype), values
    )
