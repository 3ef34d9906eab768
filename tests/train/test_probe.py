import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core.errors import PeftError
from peftjax.losses import cross_entropy
from peftjax.train.probe import fit_probe, linear_probe, majority_accuracy

SHAPE = (60, 40)  # of the training features of every test: the fit is compiled once


def examples(count, noise=0.5, size=SHAPE[1]):
    generator = np.random.default_rng(0)
    centers = 2 * generator.normal(size=(3, size))
    labels = generator.integers(0, 3, size=count)
    return centers[labels] + noise * generator.normal(size=(count, size)), labels


@pytest.mark.slow
def test_probe_separates_clusters():
    features, labels = examples(100)
    result = linear_probe(features[:60], labels[:60], features[60:], labels[60:], classes=3)
    assert result.accuracy > 0.95
    assert result.majority_accuracy < 0.5


@pytest.mark.slow
def test_probe_on_noise_chooses_a_large_penalty():
    features, labels = examples(90, size=8)
    noise = np.random.default_rng(1).normal(size=SHAPE)
    result = linear_probe(noise, labels[:60], features[60:] @ np.eye(8, 40), labels[60:], classes=3)
    assert result.penalty >= 1e-2


@pytest.mark.slow
def test_fit_is_at_the_minimum():
    features, labels = examples(60, noise=3.0)
    features, labels = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
    counts = jnp.arange(60.0) % 3  # not weakly typed, as in `linear_probe`
    weights = fit_probe(features, labels, counts, 0.1, 3)

    def loss(weights):
        logits = features @ weights["kernel"] + weights["bias"]
        return cross_entropy(logits, {"labels": labels, "weights": counts}) + 0.05 * jnp.sum(
            weights["kernel"] ** 2
        )

    gradient = jax.grad(loss)(weights)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-3
    assert jnp.abs(weights["kernel"]).max() > 0.05


def test_majority():
    assert majority_accuracy(np.array([1, 1, 0]), np.array([1, 0, 0, 2])) == 0.25


def test_bad_features():
    features, labels = examples(10)
    features[3, 2] = np.nan
    with pytest.raises(PeftError, match="not all finite"):
        linear_probe(features, labels, features, labels, classes=3)
