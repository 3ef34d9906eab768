"""Names of what a block computes, for the policies of `jax.checkpoint`; and a split of its tokens by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

BLOCK_INPUT = "block_input"
ATTENTION_RESULT = "attention_result"
OFFLOADED_TOKENS = "offloaded_tokens"


def split_by_name(share: float, part: Callable[[Array], Any], x: Float[Array, "B S D"]) -> Any:
    """`part(x)`, of which the first `share` of the tokens go by the name `OFFLOADED_TOKENS`.

    A policy that keeps this name makes only the other tokens again, which is why `part`, a function of each
    token by itself, runs once for either.

    Args:
        share: in [0, 1], of the tokens of every row, rounded down to a whole number.
        part: gives a tree of arrays [B, S, ...].
        x: the tokens.
    """
    length = x.shape[1]
    first = int(share * length)
    if first == 0:
        return part(x)
    named = checkpoint_name(part(x[:, :first]), OFFLOADED_TOKENS)
    if first == length:
        return named
    rest = part(x[:, first:])
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), named, rest)
