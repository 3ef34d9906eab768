"""Softmax attention in blocks of query rows: `[B, N, T, S]` never exists, forward or backward.

A block of rows meets only the keys it may see, and its weights are recomputed in the backward pass
from query, key and value, so those three are all that is kept. Under a causal mask that is also half
of the arithmetic. Nothing of T x S numbers is kept, no mask either, unless a bias is given.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from peftjax.quantize.activations import LogSqrt2
from peftjax.weights.dropout import drop

ROWS = 64
"""Query rows in a block: `[B, N, ROWS, S]` weights exist at a time."""
GROUPS = 8
"""Groups of blocks that are cut to their own range of keys; the blocks of a group share one program."""

Prefix = Mapping[str, Array]
"""Keys and values that lie before all others, of no row of the batch and at no place: `keys` and `values`
[P, K H], and optionally `seen` [P] bool, False where there is none."""


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query may see; every condition given must hold.

    Attributes:
        causal: only keys that are not later.
        window: only keys fewer than this many places earlier; static, traced, or None.
        offset: place of the first query among the keys, static or traced.
    """

    causal: bool = False
    window: int | Int[Array, ""] | None = None
    offset: int | Int[Array, ""] = 0

    def keys(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The range of keys that the query rows [start, stop) can see, where it is known statically."""
        first, last = 0, length
        if isinstance(self.offset, int):
            if self.causal:
                last = min(length, self.offset + stop)
            if self.causal and isinstance(self.window, int):
                first = max(0, self.offset + start - self.window + 1)
        return min(first, last), last

    def allowed(self, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Bool[Array, "T S"] | None:
        """Whether the places of keys may be seen from those of queries; None when all may."""
        distance = queries[:, None] + self.offset - keys[None, :]
        seen = distance >= 0 if self.causal else None
        if self.window is not None:
            near = distance < self.window
            seen = near if seen is None else seen & near
        return seen


@dataclasses.dataclass(frozen=True)
class _Block:
    """What the rows [start, stop) of the queries meet, as arrays cut to size."""

    scale: float
    softcap: float | None
    dropout: float

    def __call__(
        self,
        query: Float[Array, "B K GT H"],
        key: Float[Array, "B K S H"],
        value: Float[Array, "B K S V"],
        allowed: Bool[Array, "#B 1 #T S"] | None,
        bias: Float[Array, "#B K GT S"] | None,
        dropout_key: Key[Array, ""] | None,
        prefix: Prefix | None,
        codes: LogSqrt2 | None,
        sinks: Float[Array, "K G"] | None,
    ) -> Float[Array, "B K GT V"]:
        scores = self.scores("bkth,bksh->bkts", query, key)
        if bias is not None:
            scores = scores + bias
        if allowed is not None:
            groups = scores.shape[2] // allowed.shape[2]
            shape = (*scores.shape[:2], groups, allowed.shape[2], scores.shape[3])
            masked = jnp.where(allowed[:, :, None], scores.reshape(shape), 0.7 * jnp.finfo(jnp.float32).min)
            scores = masked.reshape(scores.shape)
        parts = [("bkts,bksh->bkth", scores, value)]
        if prefix is not None:
            parts.append(self.of_prefix(query, prefix))
        if sinks is not None:
            sinks = jnp.repeat(sinks.astype(jnp.float32), query.shape[2] // sinks.shape[1], axis=1)[..., None]
        if codes is not None:
            return self.rounded(parts, dropout_key, codes, sinks)
        return self.mixed(parts, dropout_key, sinks)

    def rounded(
        self,
        parts: list[tuple[str, Array, Array]],
        dropout_key: Key[Array, ""] | None,
        codes: LogSqrt2,
        sinks: Float[Array, "K GT 1"] | None,
    ) -> Array:
        """As `mixed`, with the weights rounded before they meet the values."""
        scores = [scores for _, scores, _ in parts]
        if sinks is not None:
            scores.append(jnp.broadcast_to(sinks, (*scores[0].shape[:-1], 1)))
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
        weights = codes.rounded(weights if sinks is None else weights[..., :-1])
        if dropout_key is not None:
            weights = drop(weights, self.dropout, dropout_key)
        own = jnp.split(weights, [parts[0][1].shape[-1]], axis=-1)
        sums = [
            jnp.einsum(product, part.astype(values.dtype), values, preferred_element_type=jnp.float32)
            for part, (product, _, values) in zip(own, parts)
        ]
        return functools.reduce(operator.add, sums).astype(parts[0][2].dtype)

    def mixed(
        self,
        parts: list[tuple[str, Array, Array]],
        dropout_key: Key[Array, ""] | None,
        sinks: Float[Array, "K GT 1"] | None,
    ) -> Array:
        """One softmax over the scores of all parts and the sinks, times the parts' values."""
        # Normalized after the product with the values: fewer passes over the scores, and a gradient without
        # a sum over them. The maximum only guards the exponential, its gradient is zero.
        largest = [jnp.max(scores, axis=-1, keepdims=True) for _, scores, _ in parts]
        largest = functools.reduce(jnp.maximum, largest if sinks is None else [*largest, sinks])
        largest = jax.lax.stop_gradient(largest)
        totals, sums = [] if sinks is None else [jnp.exp(sinks - largest)], []
        for number, (product, scores, values) in enumerate(parts):
            weights = jnp.exp(scores - largest)
            totals.append(jnp.sum(weights, axis=-1, keepdims=True))
            if dropout_key is not None:
                own_key = jax.random.fold_in(dropout_key, number) if number else dropout_key
                weights = drop(weights, self.dropout, own_key)
            weights = weights.astype(values.dtype)
            sums.append(jnp.einsum(product, weights, values, preferred_element_type=jnp.float32))
        total, mixed = (functools.reduce(operator.add, terms) for terms in (totals, sums))
        return (mixed / total).astype(values.dtype)

    def scores(self, product: str, query: Array, key: Array) -> Array:
        """The scaled and bounded products of queries and keys, in float32."""
        scores = jnp.einsum(product, query, key, preferred_element_type=jnp.float32) * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def of_prefix(self, query: Float[Array, "B K GT H"], prefix: Prefix) -> tuple[str, Array, Array]:
        """As the other keys' product, scores [B, K, G T, P] and values [P, K, H], without a copy a row."""
        heads = (-1, query.shape[1], query.shape[3])
        keys, values = (prefix[name].astype(query.dtype).reshape(heads) for name in ("keys", "values"))
        scores = self.scores("bkth,pkh->bktp", query, keys)
        if "seen" in prefix:
            scores = jnp.where(prefix["seen"], scores, -jnp.inf)
        return "bktp,pkh->bkth", scores, values


class _Rows(NamedTuple):
    """Rows of the queries from one on, and what belongs to each."""

    start: Int[Array, ""]
    query: Float[Array, "B K G t H"]
    segments: Int[Array, "B t"] | None
    bias: Float[Array, "#B K G t S"] | None

    def split(self, blocks: int) -> _Rows:
        """So many blocks of equal size, along a new first axis."""

        def cut(x: Array | None, axis: int) -> Array | None:
            if x is None:
                return None
            shape = (*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x.reshape(shape), axis, 0)

        starts = self.start + self.query.shape[3] // blocks * jnp.arange(blocks)
        return _Rows(starts, cut(self.query, 3), cut(self.segments, 1), cut(self.bias, 3))


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    mask: Bool[ArrayLike, "B S"] | None = None,
    segments: Int[ArrayLike, "B S"] | None = None,
    visible: Visibility = Visibility(),
    bias: Float[Array, "#B N T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    prefix: Prefix | None = None,
    codes: LogSqrt2 | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """`softmax(c(s Q K^T) + bias) V` over the keys a query may see, the softmax in float32.

    `c(x) = softcap tanh(x / softcap)` where a softcap is given. With N = G K heads, the query heads
    `k G ... (k + 1) G - 1` read key and value head k. A query that sees nothing gets the mean of
    the values; with sinks, whose exponentials join the sum of the softmax (Xiao et al. 2023, arXiv
    2309.17453, in gpt-oss's form), it gets zero.

    Args:
        query: N heads.
        key: K heads, K a divisor of N.
        value: as `key`, of heads that may have another width.
        mask: True where a key is a token.
        segments: a query sees only keys of its own segment; self-attention only (T = S).
        visible: causal order and window.
        bias: added to the scores.
        scale: `s`, by default `H ** -0.5`.
        softcap: bound of the scores.
        dropout: rate of dropout on the attention weights, when `dropout_key` is given.
        dropout_key: draws the masks, which the backward pass recomputes.
        prefix: further keys and values that every query sees, whatever the mask, the segments and
            `visible` say; without bias.
        codes: what the weights are rounded to; they then need not sum to 1.
        sinks: scores of no key, one for each head, neither scaled nor bounded.
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    block = _Block(width**-0.5 if scale is None else scale, softcap, dropout)
    # [B, K, G, T, H] and [B, K, S, H]: the rows of all heads that share a key are one operand.
    grouped = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    dtype = key.dtype
    if length > ROWS:  # their gradients are sums over blocks, which float32 can hold
        key, value = (x.astype(jnp.promote_types(dtype, jnp.float32)) for x in (key, value))
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    sinks = None if sinks is None else sinks.reshape(kv_heads, -1)
    if dropout == 0.0:
        dropout_key = None

    def attending(
        key: Float[Array, "B K S H"], value: Float[Array, "B K S V"], first: int, last: int
    ) -> Callable[[_Rows], Float[Array, "B K G t V"]]:
        own_key, own_value = key[:, :, first:last], value[:, :, first:last]
        own_mask, own_segments = (None if x is None else x[:, None, first:last] for x in (mask, segments))

        # What says which keys are seen is made in here: kept for the backward pass it is of T x S numbers.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_rows(rows: _Rows) -> Float[Array, "B K G t V"]:
            places = rows.start + jnp.arange(rows.query.shape[3])
            allowed = _all_of(
                visible.allowed(places, jnp.arange(first, last)),
                own_mask,
                None if rows.segments is None else rows.segments[:, :, None] == own_segments,
            )
            drop_key = None if dropout_key is None else jax.random.fold_in(dropout_key, rows.start)
            added = None if rows.bias is None else rows.bias.reshape(*rows.bias.shape[:2], -1, last - first)
            flat = rows.query.reshape(batch, kv_heads, -1, width)
            own = own_key.astype(dtype), own_value.astype(dtype)
            mixed = block(flat, *own, allowed, added, drop_key, prefix, codes, sinks)
            return mixed.reshape(*rows.query.shape[:-1], mixed.shape[-1])

        return of_rows

    parts = []
    for start, blocks, size in _segments(length, visible.causal):
        stop = start + blocks * size
        first, last = visible.keys(start, stop, key.shape[2])
        rows = _Rows(
            jnp.asarray(start),
            grouped[:, :, :, start:stop],
            None if segments is None else segments[:, start:stop],
            None if bias is None else bias[:, :, :, start:stop, first:last],
        )
        of_rows = attending(key, value, first, last)
        if blocks == 1:
            part = of_rows(rows)
        else:
            mapped = jax.lax.map(of_rows, rows.split(blocks))
            part = jnp.moveaxis(mapped, 0, 3).reshape(*grouped.shape[:3], blocks * size, -1)
        if stop < length:  # one run after the other, in both directions: each has arrays of its own
            key, value, part = jax.lax.optimization_barrier((key, value, part))
        parts.append(part)
    mixed = jnp.concatenate(parts, axis=3) if len(parts) > 1 else parts[0]
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _segments(length: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """`(start, blocks, rows)`: the query rows as runs of equal blocks, every run with its own keys."""
    blocks = -(-length // ROWS)
    per_group = -(-blocks // GROUPS) if causal else blocks
    start = 0
    while start < length:
        whole = min(per_group, (length - start) // ROWS)
        if whole:
            yield start, whole, ROWS
            start += whole * ROWS
        if length - start < ROWS and length > start:
            yield start, 1, length - start
            return


def _all_of(
    order: Bool[Array, "T S"] | None, *conditions: Bool[ArrayLike, "#B #T S"] | None
) -> Bool[Array, "#B 1 #T S"] | None:
    """The conjunction of the conditions given, with an axis for the heads."""
    given = [
        condition
        for condition in (None if order is None else order[None], *conditions)
        if condition is not None
    ]
    return functools.reduce(operator.and_, given)[:, None] if given else None
