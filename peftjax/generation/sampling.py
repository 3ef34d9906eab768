"""Choosing tokens by their logits: pure functions of `[B, V]`, in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from peftjax.core.errors import PeftError

Scalar = float | Float[Array, ""]


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """The k largest logits of each row, and what is as large as the k-th; the others at -inf.

    Raises:
        PeftError: unless 1 <= k <= V.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise PeftError(f"top_k must be 1 to the {logits.shape[-1]} tokens of the vocabulary, not {k}")
    smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B V"], p: Scalar) -> Float[Array, "B V"]:
    """The nucleus of each row (Holtzman et al. 2020, arXiv 1904.09751); the others at -inf.

    That is the fewest most probable tokens whose probabilities sum to p or more, one at least. Of
    equally probable tokens those of smaller number come first.
    """
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < p).at[..., 0].set(True)
    inverse = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, inverse, axis=-1), logits, -jnp.inf)


def sample(
    logits: Float[Array, "B V"],
    key: Key[Array, ""],
    *,
    temperature: Scalar = 1.0,
    top_k: int | None = None,
    top_p: Scalar | None = None,
) -> Int[Array, " B"]:
    """A token a row, drawn from `softmax(logits / temperature)` cut to the top k, then to the nucleus.

    Args:
        logits: of the next tokens.
        key: draws them.
        temperature: positive.
        top_k: see `keep_top_k`; None keeps all.
        top_p: see `keep_top_p`; None keeps all.

    Raises:
        PeftError: as `keep_top_k`.
    """
    scaled = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        scaled = keep_top_k(scaled, top_k)
    if top_p is not None:
        scaled = keep_top_p(scaled, top_p)
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The most probable token of each row, the first of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: `choice(logits, key, count)`; see `choice`.

    Attributes:
        temperature: of the softmax; None takes the most probable token.
        top_k: as of `sample`.
        top_p: as of `sample`.
    """

    temperature: Scalar | None = None
    top_k: int | None = field(default=None, metadata={"static": True})
    top_p: Scalar | None = None

    def __call__(
        self, logits: Float[Array, "B V"], key: Key[Array, ""] | None, count: int | Int[Array, ""]
    ) -> Int[Array, " B"]:
        """The token that follows `count` new ones; every count draws with a key of its own."""
        if self.temperature is None:
            return greedy(logits)
        own = jax.random.fold_in(key, count)
        return sample(logits, own, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def choice(*, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> Choice:
    """How to choose tokens.

    Args:
        temperature: of the softmax; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the fewest most probable tokens that have this probability together.

    Raises:
        PeftError: for a value out of range, or top_k or top_p at temperature 0.
    """
    if not 0.0 <= temperature < math.inf:
        raise PeftError(f"temperature must be 0 (the most probable token) or positive, not {temperature}")
    if top_k is not None and top_k < 1:
        raise PeftError(f"top_k must be 1 or more, not {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise PeftError(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature == 0.0:
        if top_k is not None or top_p is not None:
            raise PeftError("top_k and top_p have no effect at temperature 0; give a temperature, such as 1")
        return Choice()
    return Choice(temperature, top_k, top_p)
