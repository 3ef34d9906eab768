"""The linear probe: what a classifier on frozen features reaches without any fine-tuning."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from peftjax.core.errors import PeftError
from peftjax.losses import accuracy, cross_entropy

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for λ."""
HELD_OUT_SHARE = 0.2
ITERATIONS = 200
TOLERANCE = 1e-4
"""L-BFGS stops at this norm of the gradient."""

Weights = dict[str, Float[Array, "..."]]


@dataclass(frozen=True)
class ProbeResult:
    """A linear probe's accuracy on the evaluation examples, beside that of the constant guess."""

    accuracy: float
    penalty: float
    """The λ chosen."""
    majority_accuracy: float
    """Accuracy of always answering the most frequent training label."""
    weights: Weights
    """`kernel` [D, C] and `bias` [C] for the features as they were given."""


def linear_probe(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    eval_features: Float[np.ndarray, "M D"],
    eval_labels: Int[np.ndarray, "M"],
    *,
    classes: int,
    seed: int = 0,
) -> ProbeResult:
    """Multinomial logistic regression on standardized features, by full-batch L-BFGS:

    min over W [D, C], b [C] of  mean_i CE(x_i W + b, y_i) + λ/2 ‖W‖².

    λ is the one of `PENALTIES` with the highest accuracy on `HELD_OUT_SHARE` of the training
    examples (of equals the largest); then the probe is fitted on all of them.

    Raises:
        PeftError: fewer than two training examples, or features that are not finite.
    """
    features, eval_features = (jnp.asarray(x, jnp.float32) for x in (features, eval_features))
    labels, eval_labels = jnp.asarray(labels), jnp.asarray(eval_labels)
    if len(features) < 2:
        raise PeftError(f"a linear probe needs at least 2 training examples, not {len(features)}")
    if not (jnp.isfinite(features).all() and jnp.isfinite(eval_features).all()):
        raise PeftError("the features for the linear probe are not all finite")
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    features, eval_features = ((x - mean) / deviation for x in (features, eval_features))

    order = np.random.default_rng(seed).permutation(len(features))
    count = max(1, int(HELD_OUT_SHARE * len(features)))
    held_out = order[:count]
    everything = jnp.ones(len(features))
    fitted = everything.at[held_out].set(0.0)  # by weight: the same shapes, so compiled once
    scores = {}
    for penalty in PENALTIES:
        weights = fit_probe(features, labels, fitted, penalty, classes)
        scores[penalty] = _accuracy(weights, features[held_out], labels[held_out])
    penalty = max(PENALTIES, key=lambda value: (scores[value], value))
    weights = fit_probe(features, labels, everything, penalty, classes)
    return ProbeResult(
        accuracy=_accuracy(weights, eval_features, eval_labels),
        penalty=penalty,
        majority_accuracy=majority_accuracy(np.asarray(labels), np.asarray(eval_labels)),
        weights={
            "kernel": weights["kernel"] / deviation[:, None],
            "bias": weights["bias"] - mean / deviation @ weights["kernel"],
        },
    )


def majority_accuracy(labels: Int[np.ndarray, "N"], eval_labels: Int[np.ndarray, "M"]) -> float:
    """Accuracy of always answering the most frequent label of `labels`."""
    return float(np.mean(eval_labels == np.bincount(labels).argmax()))


@jax.jit(static_argnames="classes")
def fit_probe(
    features: Float[Array, "N D"],
    labels: Int[Array, "N"],
    counts: Float[Array, "N"],
    penalty: float,
    classes: int,
) -> Weights:
    """The minimizer of the regularized loss, started at zero (the problem is convex).

    `counts` are the examples' weights in the mean.
    """

    def loss(weights: Weights) -> Float[Array, ""]:
        logits = features @ weights["kernel"] + weights["bias"]
        decay = penalty / 2 * jnp.sum(weights["kernel"] ** 2)
        return cross_entropy(logits, {"labels": labels, "weights": counts}) + decay

    start = {"kernel": jnp.zeros((features.shape[1], classes)), "bias": jnp.zeros(classes)}
    return _minimize(loss, start)


def _minimize(loss: Callable[[Weights], Array], start: Weights) -> Weights:
    """Full-batch L-BFGS until the gradient is small or `ITERATIONS` are done."""
    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def improve(carry: tuple[Weights, optax.OptState]) -> tuple[Weights, optax.OptState]:
        weights, state = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = tx.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(weights, updates), state

    def goes_on(carry: tuple[Weights, optax.OptState]) -> Array:
        state = carry[1]
        count = optax.tree.get(state, "count")
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return (count == 0) | ((count < ITERATIONS) & (norm > TOLERANCE))

    return jax.lax.while_loop(goes_on, improve, (start, tx.init(start)))[0]


def _accuracy(weights: Weights, features: Float[Array, "N D"], labels: Int[Array, "N"]) -> float:
    return float(accuracy(features @ weights["kernel"] + weights["bias"], {"labels": labels}))
