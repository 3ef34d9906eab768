"""Splash attention, of `jax.experimental.pallas`: it skips blocks of queries and keys that do not meet.

Tokens are filled up to whole tiles of 128; what fills up the keys is seen by no token. The softmax and its
sums are in float32; the scale is multiplied into the queries, which are rounded to their dtype once more.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from peftjax.kernels.attention.operands import Operands, Scores
from peftjax.kernels.attention.windows import by_window

TILE = 128
BLOCKS = (512, 384, 256, 128)
"""Queries, and keys, of a block: the first that divides the filled length."""
FILLED = np.iinfo(np.int32).min
"""The segment of keys that are no tokens."""


def refused(operands: Operands, scores: Scores) -> str | None:
    """Why the kernel cannot compute it; None where it can."""
    if operands.query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention has no {operands.query.dtype}"
    if scores.causal and operands.query.shape[1] != operands.key.shape[1]:
        return "causal queries are not as many as the keys"
    return None


def attend(operands: Operands, scores: Scores, *, interpret: bool = False) -> Array:
    """`softmax(c(s Q K^T)) V`, [B, T, N, V]. A query that sees nothing gets a mean of some of the values."""
    query, key, value, mask, segments, window, sinks = operands
    length, keys = query.shape[1], key.shape[1]
    query = (query.astype(jnp.float32) * scores.scale).astype(query.dtype)
    # Heads before tokens, filled up.
    query, key, value = (_filled(x.swapaxes(1, 2), 2) for x in (query, key, value))
    hidden = mask is not None or segments is not None or (key.shape[2] != keys and not scores.causal)
    ids = None
    if hidden:
        own = jnp.zeros((query.shape[0], keys), jnp.int32) if segments is None else segments
        seen = own if mask is None else jnp.where(mask, own, FILLED)
        of_queries = own if length == keys else jnp.zeros((query.shape[0], length), jnp.int32)
        ids = SegmentIds(_filled(of_queries, 1), _filled(seen, 1, FILLED))

    def run(window: int | None, *arrays: Any) -> Array:
        kernel = make_splash_mha(
            _masks(query.shape, key.shape, scores.causal, window),
            block_sizes=_blocks(query.shape[2], key.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=scores.softcap,
            interpret=interpret,
        )
        return jax.vmap(kernel, (0, 0, 0, 0, None))(*arrays)

    mixed = by_window(scores.windows, window, keys, run, (query, key, value, ids, sinks))
    return mixed[:, :, :length].swapaxes(1, 2)


def _filled(x: Array, axis: int, value: int = 0) -> Array:
    missing = -x.shape[axis] % TILE
    padding = [(0, missing if at == axis else 0) for at in range(x.ndim)]
    return jnp.pad(x, padding, constant_values=value) if missing else x


def _blocks(length: int, keys: int) -> BlockSizes:
    rows, columns = (next(size for size in BLOCKS if n % size == 0) for n in (length, keys))
    return BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )


def _masks(query: tuple[int, ...], key: tuple[int, ...], causal: bool, window: int | None) -> MultiHeadMask:
    shape = (query[2], key[2])
    whole = not causal and window is None
    return MultiHeadMask([FullMask(shape) if whole else _OrderMask(shape, _Order(causal, window))] * query[1])


@dataclass(frozen=True)
class _Order:
    """Whether the place of a key may be seen from that of a query; the kernel asks it for a block."""

    causal: bool
    window: int | None

    def __call__(self, queries: Any, keys: Any) -> Any:
        seen = queries >= keys if self.causal else None
        if self.window is None:
            return seen
        near = queries - keys < self.window
        return near if seen is None else seen & near


@dataclass(frozen=True)
class _OrderMask(Mask):
    """A mask that the kernel computes.

    Splash attention reads every block of [T, S] to find those that it skips, minutes for 100,000 tokens. Of a
    block in which all pairs are alike one number says it.
    """

    sizes: tuple[int, int]
    mask_function: _Order

    @property
    def shape(self) -> tuple[int, int]:
        """[T, S]."""
        return self.sizes

    @cached_property
    def q_sequence(self) -> np.ndarray:
        """The place of every query."""
        return np.arange(self.sizes[0], dtype=np.int32)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(*part.indices(n)) for part, n in zip(block, self.sizes))
        order = self.mask_function
        nearest, furthest = rows[0] - columns[-1], rows[-1] - columns[0]
        if order(np.asarray([nearest, furthest]), 0).all():
            return np.ones((1, 1), bool)
        if (order.causal and furthest < 0) or (order.window is not None and nearest >= order.window):
            return np.zeros((1, 1), bool)
        return order(rows[:, None], columns[None, :])
