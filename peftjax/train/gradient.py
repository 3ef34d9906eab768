"""The gradient of a batch: of the mean over all that counts in it, computed whole or in parts."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from peftjax.losses import Batch, mean
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform

Metrics = dict[str, Float[Array, ""]]
Sums = tuple[Mapping[str, Float[Array, ""]], Float[Array, ""]]
"""Sums over a batch, "loss" among them, and the weight that they are divided by."""
Loss = Callable[..., Float[Array, ""] | Sums]
"""`(params, batch) -> mean loss of the batch`, or `Sums`. One that takes `key` too is given one in a step."""


def gradient_of_batch(
    method: Transform,
    loss: Loss,
    accumulation: int,
    trainable: Trainable,
    frozen: Frozen,
    batch: Batch,
    key: Key[Array, ""] | None,
) -> tuple[Trainable, Metrics]:
    """The gradient of a batch's weighted mean loss, also where its parts weigh differently, and the means.

    Args:
        method: the method.
        loss: of rewritten parameters and a batch.
        accumulation: the equal parts in which the batch is computed, one after the other.
        trainable: as it lies between steps; the gradient is that of what a step begins with.
        frozen: of the method.
        batch: of which the first axes divide into the parts.
        key: for the method's and the model's dropout; without it there is none.
    """
    of_part = partial(_of_part, method, loss, trainable, frozen)
    if accumulation == 1:
        gradients, sums, weight = of_part(batch, key)
        return gradients, {name: mean(total, weight) for name, total in sums.items()}
    parts = _parts(batch, accumulation)
    keys = None if key is None else jax.random.split(key, accumulation)
    first = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], (parts, keys)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

    def add(total: Any, part: tuple[Batch, Key[Array, ""] | None]) -> tuple[Any, None]:
        gradients, sums, weight = of_part(*part)
        return jax.tree.map(jnp.add, total, (_times(gradients, weight), sums, weight)), None

    total, sums, weight = jax.lax.scan(add, zeros, (parts, keys))[0]
    gradients = _times(total, mean(jnp.ones_like(weight), weight))
    return gradients, {name: mean(total, weight) for name, total in sums.items()}


def loss_of_batch(loss: Loss, accumulation: int, batch: Batch) -> Callable[[Params], Float[Array, ""]]:
    """`params -> mean loss`, in a step's parts, each recomputed in the backward pass; no dropout."""

    def of_batch(params: Params) -> Array:
        if accumulation == 1:
            sums, weight = _sums(loss, params, batch, None)
            return mean(sums["loss"], weight)

        @jax.checkpoint
        def of_part(part: Batch) -> tuple[Array, Array]:
            sums, weight = _sums(loss, params, part, None)
            return sums["loss"], weight

        losses, weights = jax.lax.map(of_part, _parts(batch, accumulation))
        return mean(jnp.sum(losses), jnp.sum(weights))

    return of_batch


def _of_part(
    method: Transform,
    loss: Loss,
    trainable: Trainable,
    frozen: Frozen,
    batch: Batch,
    key: Key[Array, ""] | None,
) -> tuple[Trainable, Mapping[str, Array], Array]:
    """The gradient of a part of a batch, its sums and its weight."""
    method_key, model_key = (None, None) if key is None else jax.random.split(key)
    # Here and not before the parts of a batch: zeros that are carried through their loop take memory.
    frozen, opened = method.begin(frozen, trainable)

    def mean_loss(trainable: Trainable) -> tuple[Array, Sums]:
        params = method.apply(frozen, trainable, key=method_key)
        sums, weight = _sums(loss, params, batch, model_key)
        # The mean, not the sum: a penalty that a method adds to the gradient is not of the batch.
        return mean(sums["loss"], weight), (sums, weight)

    gradients, (sums, weight) = jax.grad(mean_loss, has_aux=True)(opened)
    return gradients, sums, weight


def _sums(loss: Loss, params: Params, batch: Batch, key: Key[Array, ""] | None) -> Sums:
    """The loss of a batch as sums and their weight."""
    given = {} if key is None or "key" not in inspect.signature(loss).parameters else {"key": key}
    found = loss(params, batch, **given)
    return found if isinstance(found, tuple) else ({"loss": found}, jnp.ones(()))


def _parts(batch: Batch, accumulation: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)


def _times(gradients: Any, factor: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradients)
