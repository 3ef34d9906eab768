"""A part of a block on some of the tokens at a time, so that what is wide exists of those alone."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.layers import recompute_module


def in_tiles(
    part: Callable[[Any, Array], Array], block: nn.Module, x: Float[Array, "B S D"], tile: int
) -> Float[Array, "B S D"]:
    """`part(block, x)`, a function of each token by itself, a tile of tokens after the other.

        y_t = part(x_t)    t = 1 ... ceil(S / tile)

    The backward pass keeps x and computes a tile again before it goes through it; the gradients of the
    weights are the sums over the tiles.

    Args:
        part: of the block and tokens [B, n, D].
        block: the module, bound.
        x: the tokens of each row.
        tile: how many of each row's tokens are taken at a time; the last tile has what is left.
    """
    count = x.shape[1] // tile
    whole = x[:, : count * tile]
    recomputed = recompute_module(part)

    def step(block: nn.Module, carry: tuple[()], one: Array) -> tuple[tuple[()], Array]:
        return carry, recomputed(block, one)

    scanned = nn.scan(
        step,
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        in_axes=1,
        out_axes=1,
    )
    _, done = scanned(block, (), whole.reshape(x.shape[0], count, tile, x.shape[2]))
    done = done.reshape(whole.shape)
    if whole.shape == x.shape:
        return done
    return jnp.concatenate([done, recomputed(block, x[:, count * tile :])], axis=1)
