"""Losses and scores of a batch, computed in float32; over a vocabulary, part by part."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peftjax.backbone.logits import Logits
from peftjax.weights.base import cast

Batch = Mapping[str, Array]
Objective = Callable[[Any, Batch], tuple[dict[str, Float[Array, ""]], Float[Array, ""]]]
"""`(outputs, batch) -> (sums, weight)`: `sums["loss"] / weight` is minimized, and every other
`sums[name] / weight` reported. Sums, because those of the parts of a batch can be added. A weight of zero
means that nothing of the batch counts."""

CHUNK = 512
"""Tokens whose logits over a vocabulary exist at a time on a device."""


def cross_entropy(logits: Float[Array, "*B C"] | Logits, batch: Batch) -> Float[Array, ""]:
    """Weighted mean of -log softmax(logits)[label], in float32.

    A row of weight 0 counts for nothing, whatever its logits are; where all are, loss and gradient are 0.

    Args:
        logits: an array of any floating dtype, or a language model's `Logits`, which are then
            computed `CHUNK` tokens at a time: `[B, S, V]` exists neither forward nor backward.
        batch: `labels` [*B] int32, and optionally `weights` [*B].

    Examples:
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 0.0]])
        >>> batch = {"labels": jnp.array([0, 1]), "weights": jnp.array([0.0, 1.0])}
        >>> round(float(pj.losses.cross_entropy(logits, batch)), 3)
        0.693
    """
    return _mean(logits, batch)[0]


def accuracy(logits: Float[Array, "*B C"] | Logits, batch: Batch) -> Float[Array, ""]:
    """Weighted share of the examples whose largest logit is the label's; arguments as above.

    Examples:
        >>> float(pj.losses.accuracy(jnp.array([[2.0, 0.0], [0.0, 1.0]]), {"labels": jnp.array([0, 0])}))
        0.5
    """
    return _mean(logits, batch)[1]


def classification(
    logits: Float[Array, "*B C"] | Logits, batch: Batch
) -> tuple[dict[str, Float[Array, ""]], Float[Array, ""]]:
    """The objective of classification, of texts or of next tokens: weighted sums, and their weight."""
    weights = batch["weights"].astype(jnp.float32)
    loss, hits = _sums(logits, batch["labels"], weights)
    return {"loss": loss, "accuracy": hits}, jnp.sum(weights)


def load_balancing(
    logits: Float[Array, "*L E"], chosen: int, mask: Int[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """How unevenly a router fills its experts (Fedus et al. 2022, arXiv 2101.03961, equations 4 to 6).

        E sum_e f_e p_e     f_e: how many of a token's choices are e, p_e: the mean probability of e

    over all tokens of all layers; the least is k, where all experts are taken alike.

    Args:
        logits: `[*layers, *tokens, E]`, as of `peftjax.backbone.router_logits`.
        chosen: k, how many experts each token has.
        mask: of the tokens, those that count: of the shape of `logits` without layers and E.

    Examples:
        >>> float(pj.losses.load_balancing(jnp.zeros((2, 8, 4)), chosen=1))
        1.0
    """
    count = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, numbers = jax.lax.top_k(probabilities, chosen)
    weights = jnp.ones((), jnp.float32) if mask is None else mask.astype(jnp.float32)
    weights = jnp.broadcast_to(weights, logits.shape[:-1])
    choices = (numbers[..., None] == jnp.arange(count)).sum(-2)
    shares, means = (
        mean(jnp.einsum("...e,...->e", one, weights), weights.sum()) for one in (choices, probabilities)
    )
    return count * jnp.sum(shares * means)


def mean(total: Float[Array, "*S"], weight: Float[Array, ""]) -> Float[Array, "*S"]:
    """`total / weight`, and zeros where nothing has weight."""
    some = weight > 0
    return jnp.where(some, total / jnp.where(some, weight, 1.0), 0.0)


def _mean(logits: Array | Logits, batch: Batch) -> tuple[Array, Array]:
    weights = batch.get("weights", jnp.ones(batch["labels"].shape, jnp.float32)).astype(jnp.float32)
    loss, hits = _sums(logits, batch["labels"], weights)
    return mean(loss, jnp.sum(weights)), mean(hits, jnp.sum(weights))


def _sums(
    logits: Array | Logits, labels: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Array, Array]:
    """Weighted sums of the losses and of the hits."""
    if not isinstance(logits, Logits):
        return _array_sums(logits, labels, weights)
    logits = replace(logits, kernel=cast(logits.kernel, logits.dtype))
    return _chunked_sums(logits, labels, jax.lax.stop_gradient(weights))


def _array_sums(
    logits: Float[Array, "*B C"], labels: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Array, Array]:
    # Not after the loss: 0 · inf is undefined, and so is a gradient of zero through infinite logits.
    logits = jnp.where((weights != 0)[..., None], logits.astype(jnp.float32), 0.0)
    # A comparison, not a lookup: its gradient needs no scatter.
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    label_logits = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - label_logits
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return jnp.sum(weights * losses), jnp.sum(weights * hits)


@jax.custom_vjp
def _chunked_sums(
    logits: Logits, labels: Int[Array, "B S"], weights: Float[Array, "B S"]
) -> tuple[Array, Array]:
    """`_array_sums`, some columns of `labels` at a time.

    The gradient of a sum is known when the sum is: it is formed with each chunk, so that no product
    over the vocabulary runs twice, and only for the parts of `logits` that are differentiated.
    """

    def add(sums: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], None]:
        hidden, labels, weights = chunk
        part = _array_sums(replace(logits, hidden=hidden).dense(), labels, weights)
        return jax.tree.map(jnp.add, sums, part), None

    zeros = (jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(add, zeros, _chunks(logits, labels, weights))[0]


def _sums_and_gradients(logits: Any, labels: Any, weights: Any) -> tuple[tuple[Array, Array], Any]:
    leaves, structure = jax.tree.flatten(logits, is_leaf=lambda node: hasattr(node, "perturbed"))
    values = [leaf.value for leaf in leaves]
    of_hidden, *of_rest = [leaf.perturbed for leaf in leaves]
    plain = jax.tree.unflatten(structure, values)
    labels, weights = labels.value, weights.value
    moving = [value for value, perturbed in zip(values[1:], of_rest) if perturbed]

    def loss(hidden: Array, moving: list[Array], labels: Array, weights: Array) -> tuple[Array, Array]:
        moved = iter(moving)
        rest = [next(moved) if perturbed else value for value, perturbed in zip(values[1:], of_rest)]
        part = jax.tree.unflatten(structure, [hidden, *rest])
        return _array_sums(part.dense(), labels, weights)

    def add(carry: Any, chunk: Any) -> tuple[Any, Array]:
        sums, totals = carry
        hidden, labels, weights = chunk
        value, pull, hits = jax.vjp(
            partial(loss, labels=labels, weights=weights), hidden, moving, has_aux=True
        )
        of_chunk, gradients = pull(jnp.ones_like(value))
        totals = jax.tree.map(lambda total, new: total + new.astype(total.dtype), totals, gradients)
        return ((sums[0] + value, sums[1] + hits), totals), of_chunk

    zeros = (jnp.float32(0), jnp.float32(0))
    totals = [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in moving]
    chunks = _chunks(plain, labels, weights)
    (sums, totals), by_chunk = jax.lax.scan(add, (zeros, totals), chunks)
    hidden = _joined(by_chunk, plain) if of_hidden else None
    moved = iter(total.astype(leaf.dtype) for total, leaf in zip(totals, moving))
    rest = [next(moved) if perturbed else None for perturbed in of_rest]
    return sums, jax.tree.unflatten(structure, [hidden, *rest])


def _scale_gradients(gradients: Any, cotangents: tuple[Any, Any]) -> tuple[Any, None, None]:
    of_loss, _ = cotangents
    return jax.tree.map(lambda gradient: gradient * of_loss.astype(gradient.dtype), gradients), None, None


_chunked_sums.defvjp(_sums_and_gradients, _scale_gradients, symbolic_zeros=True)


def _chunks(logits: Logits, *by_token: Array) -> tuple[Array, ...]:
    """The hidden states and other arrays cut along the sequence, [chunks, B, s, ...], padded with zeros.

    Where tokens are divided over devices, each chunk has as many of every device's.
    """
    batch, length = logits.hidden.shape[:2]
    parts = logits.token_devices
    each = length // parts
    size = max(1, min(each, CHUNK * logits.devices // (batch * parts)))
    count = -(-each // size)

    def of_one(x: Array) -> Array:
        padding = [(0, 0), (0, count * size - each)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def cut(x: Array) -> Array:
        if parts == 1:
            return of_one(x)
        by_part = jax.vmap(of_one, 1, 2)(x.reshape(batch, parts, each, *x.shape[2:]))
        return by_part.reshape(count, batch, parts * size, *x.shape[2:])

    return cut(logits.hidden), *map(cut, by_token)


def _joined(chunks: Float[Array, "C B s D"], logits: Logits) -> Float[Array, "B S D"]:
    """Undoes `_chunks`, of hidden states."""
    shape, parts = logits.hidden.shape, logits.token_devices
    if parts == 1:
        return jnp.moveaxis(chunks, 0, 1).reshape(shape[0], -1, shape[2])[:, : shape[1]]
    by_part = jnp.moveaxis(chunks.reshape(len(chunks), shape[0], parts, -1, shape[2]), 0, 2)
    joined = by_part.reshape(shape[0], parts, -1, shape[2])[:, :, : shape[1] // parts]
    return joined.reshape(shape)
