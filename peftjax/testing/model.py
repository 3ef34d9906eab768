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
    random = np.random.default_rng(7)

    def drawn(*shape: int) -> np.ndarray:
        return 0.3 * random.standard_normal(shape, np.float32)

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

    params = jax.tree.map(jnp.array, params)
    return Model(forward, params, jnp.array(random.integers(0, 11, (2, 5)), jnp.int32))


def moved(values: Any, seed: Any = 0, scale: float = 0.1) -> Any:
    """A tree as after some steps of training: every number moved by its own random amount.

    The arrays stay where they are; nothing is compiled.
    """
    noise = np.random.default_rng(seed)

    def move(leaf: jax.Array) -> jax.Array:
        drawn = scale * noise.standard_normal(leaf.shape)
        new = (np.asarray(leaf, np.float32) + drawn).astype(leaf.dtype)
        return jax.device_put(new, leaf.sharding) if getattr(leaf, "committed", False) else jnp.array(new)

    return jax.tree.map(move, values)
