"""How many weights each matrix may keep: a volume shared out by scores, with a cap per matrix."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.methods._importance import sensitivities

# A share this small of all scores is below float32's rounding wherever scores matter.
_LEAST_SCORE = 1e-12


def scores(importance: Any, deviation: Any) -> dict[str, Array]:
    """`mean(Ī Ū)` of a plus that of b, `[*stack]` by path, up to a factor common to all."""
    found = sensitivities(importance, deviation)
    means = jax.tree.map(lambda of_factor: jnp.mean(of_factor, axis=(-3, -2, -1)), found)
    return {path: slots["a"] + slots["b"] for path, slots in means.items()}


def allocate(kept: Array, scores: Mapping[str, Array], capacities: Mapping[str, int]) -> dict[str, Array]:
    """The levels under which the share `kept` of all weights is kept, `[*stack]` by path.

    Each matrix keeps in proportion to its score and no more than it has.

    Args:
        kept: the share of all weights, a scalar.
        scores: not negative, `[*stack]` by path.
        capacities: n·m of the matrices of each path.
    """
    flat = jnp.concatenate([scores[path].reshape(-1) for path in scores])
    sizes = np.concatenate([np.full(scores[path].size, capacities[path], np.float64) for path in scores])
    shares = jnp.asarray(sizes / sizes.sum(), jnp.float32)
    levels = jnp.clip(1.0 - water_fill(kept, flat, shares) / shares, 0.0, 1.0)
    ends = np.cumsum([value.size for value in scores.values()])[:-1]
    return {
        path: part.reshape(value.shape)
        for (path, value), part in zip(scores.items(), jnp.split(levels, ends))
    }


def water_fill(total: Array, scores: Array, caps: Array) -> Array:
    """`min(caps, λ scores)` with the sum `total`, for vectors `[L]`; equal scores where all are zero.

    The matrices that are full come first in the order of score by capacity: λ is the one under which
    the first that is not full has room.
    """
    whole = jnp.sum(scores)
    scores = jnp.where(whole > 0.0, scores / whole, 1.0 / scores.size)
    scores = jnp.maximum(scores, _LEAST_SCORE)
    order = jnp.argsort(-scores / caps)
    sizes, weights = caps[order], scores[order]
    full = jnp.cumsum(sizes) - sizes
    ratios = (total - full) / jnp.cumsum(weights[::-1])[::-1]
    fits = ratios * weights <= sizes
    ratio = jnp.where(jnp.any(fits), ratios[jnp.argmax(fits)], jnp.inf)
    return jnp.minimum(caps, ratio * scores)


def capacities(factors: Mapping[str, Mapping[str, Array]]) -> dict[str, int]:
    """n·m by path."""
    return {path: slots["a"].shape[-1] * slots["b"].shape[-1] for path, slots in factors.items()}
