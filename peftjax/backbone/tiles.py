"""A part of a block on some of the tokens at a time, so that what is wide exists of those alone."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.backbone.layers import recompute_module


def in_tiles(
    part: Callable[[Any, Array], Array],
    block: nn.Module,
    x: Float[Array, "B S D"],
    tile: int,
    devices: int = 1,
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
        devices: over how many devices the tokens of a row are divided: as many are taken of each one's.
    """
    batch, length, width = x.shape
    each = length // devices
    count = each // tile
    by_device = x.reshape(batch, devices, each, width)
    whole = by_device[:, :, : count * tile].reshape(batch, devices, count, tile, width)
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
    tiles = jnp.moveaxis(whole, 2, 1).reshape(batch, count, devices * tile, width)
    _, done = scanned(block, (), tiles)
    done = jnp.moveaxis(done.reshape(batch, count, devices, tile, width), 1, 2)
    done = done.reshape(batch, devices, count * tile, width)
    if count * tile < each:
        rest = recomputed(block, by_device[:, :, count * tile :].reshape(batch, -1, width))
        done = jnp.concatenate([done, rest.reshape(batch, devices, -1, width)], axis=2)
    return done.reshape(x.shape)
