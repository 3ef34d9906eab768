"""Losses and scores of a batch, computed in float32."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Batch = Mapping[str, Array]
Objective = Callable[[Array, Batch], tuple[dict[str, Float[Array, ""]], Float[Array, ""]]]
"""`(outputs, batch) -> (sums, weight)`: `sums["loss"] / weight` is minimised, and every other
`sums[name] / weight` reported. Sums, because those of the parts of a batch can be added."""


def cross_entropy(logits: Float[Array, "*B C"], batch: Batch) -> Float[Array, ""]:
    """Weighted mean of -log softmax(logits)[label], in float32.

    Args:
        logits: any floating dtype.
        batch: `labels` [*B] int32, and optionally `weights` [*B].
    """
    return _mean(_label_losses(logits, batch["labels"]), batch)


def accuracy(logits: Float[Array, "*B C"], batch: Batch) -> Float[Array, ""]:
    """Weighted part of the examples whose largest logit is the label's; `batch` as above."""
    return _mean(_hits(logits, batch["labels"]), batch)


def classification(
    logits: Float[Array, "B C"], batch: Batch
) -> tuple[dict[str, Float[Array, ""]], Float[Array, ""]]:
    """The objective of classification: weighted sums of loss and hits, and the sum of weights."""
    weights = batch["weights"]
    sums = {
        "loss": jnp.sum(weights * _label_losses(logits, batch["labels"])),
        "accuracy": jnp.sum(weights * _hits(logits, batch["labels"])),
    }
    return sums, jnp.sum(weights)


def _label_losses(logits: Float[Array, "*B C"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]


def _hits(logits: Float[Array, "*B C"], labels: Int[Array, "*B"]) -> Float[Array, "*B"]:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def _mean(values: Float[Array, "*B"], batch: Batch) -> Float[Array, ""]:
    if "weights" not in batch:
        return jnp.mean(values)
    return jnp.sum(batch["weights"] * values) / jnp.sum(batch["weights"])
