"""What a block's backward pass may read instead of recomputing it: policies of `jax.checkpoint` by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from peftjax.core.errors import PeftError

BLOCK_INPUT = "block_input"
ATTENTION_RESULT = "attention_result"
OFFLOADED_TOKENS = "offloaded_tokens"
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload_dot_with_no_batch_dims": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
    "save_attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULT),
    "offload_attention": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT, ATTENTION_RESULT, OFFLOADED_TOKENS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""`jax.checkpoint` policies by name: what a block's backward pass may read instead of recomputing it.

`save_attention` keeps what enters a block, as every policy does, and what its attention gives, so that
attention, the one part whose cost grows with the square of the length, is not recomputed; the rest is
recomputed token by token. `offload_attention` keeps the two in the host's memory (MEMO, arXiv
2407.12117), and with a share, as in "offload_attention:0.3", also the rest for the first three tenths of
each row's tokens: `read_remat`.
"""


def read_remat(remat: str | None) -> tuple[str, float]:
    """A policy's name, or "none", and the share of the tokens it offloads whole.

    Raises:
        PeftError: for a share of another policy than "offload_attention", or outside of [0, 1].
    """
    name, colon, share = (remat or "none").partition(":")
    if not colon:
        return name, 0.0
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    if name != "offload_attention" or not 0.0 <= number <= 1.0:
        raise PeftError(f"remat policy {remat!r}: only 'offload_attention:SHARE' has a share, in [0, 1]")
    return name, number


def split_by_name(
    share: float,
    part: Callable[[Array], Any],
    x: Float[Array, "B S D"],
    then: Callable[[Any], Any] = lambda inner: inner,
) -> Any:
    """`then(part(x))`, where what `part` gives of the first `share` of tokens is named `OFFLOADED_TOKENS`.

    A policy that keeps this name recomputes only the other tokens, which is why `part`, a function of each
    token by itself, runs once for either.

    Args:
        share: in [0, 1], of the tokens of every row, rounded down to a whole number.
        part: gives a tree, whose arrays are [B, S, ...] without `then`.
        x: the tokens.
        then: gives a tree of arrays [B, S, ...] of that, and is not named.
    """
    length = x.shape[1]
    first = int(share * length)
    if first == 0:
        return then(part(x))
    named = then(checkpoint_name(part(x[:, :first]), OFFLOADED_TOKENS))
    if first == length:
        return named
    rest = then(part(x[:, first:]))
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), named, rest)
