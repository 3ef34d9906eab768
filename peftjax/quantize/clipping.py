"""Where to cut the range of an activation off: the percentile with the least squared error, of a stream.

Percentiles near the ends need the few largest and smallest values alone, so that no more is held of a stream.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from peftjax.quantize.activations import LogSqrt2, Uniform

PERCENTILES = (0.999, 0.9999, 0.99999)
"""Of RepQ-ViT's search; its lower end is cut off at one less each."""


@partial(jax.tree_util.register_dataclass, data_fields=["low", "high", "count"], meta_fields=[])
@dataclass(frozen=True)
class Tails:
    """The smallest and the largest values of each channel so far, and how many there were.

    Attributes:
        low: `[k, C]`, rising, infinite where there were fewer.
        high: `[k, C]`, falling, minus infinity where there were fewer.
        count: of a channel, float32: the weights of long rows are more than int32 counts.
    """

    low: Float[Array, "k C"]
    high: Float[Array, "k C"]
    count: Float[Array, ""]

    def joined(self, x: Float[Array, "N C"], counts: Bool[Array, " N"]) -> "Tails":
        """With further values, those of the rows that count."""
        x, size = x.astype(jnp.float32), len(self.low)
        low = jnp.sort(jnp.concatenate([self.low, jnp.where(counts[:, None], x, jnp.inf)]), axis=0)[:size]
        high = jnp.sort(jnp.concatenate([-self.high, jnp.where(counts[:, None], -x, jnp.inf)]), axis=0)
        return Tails(low, -high[:size], self.count + counts.sum().astype(jnp.float32))

    def range_of(self, percentile: float) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """The values below which `1 - percentile` and `percentile` of each channel are, interpolated."""
        place = (1 - percentile) * jnp.maximum(self.count - 1, 0)
        below = place.astype(jnp.int32)
        part = place - below
        above = jnp.minimum(below + 1, jnp.maximum(self.count - 1, 0).astype(jnp.int32))
        return tuple(ends[below] + part * (ends[above] - ends[below]) for ends in (self.low, self.high))


def no_tails(channels: int, values: int) -> Tails:
    """Tails that hold what `PERCENTILES` need of so many values a channel, and have none yet."""
    size = min(values, math.ceil((1 - min(PERCENTILES)) * values) + 2)
    ends = jnp.full((size, channels), jnp.inf, jnp.float32)
    return Tails(ends, -ends, jnp.float32(0))


def candidates(
    tails: Tails, quantizer_of: Callable[[Array, Array], Uniform | LogSqrt2]
) -> tuple[Uniform | LogSqrt2, Float[Array, "P C"]]:
    """The quantizers of all percentiles, one more axis before the others of each array, and errors of 0.

    Args:
        tails: of all values.
        quantizer_of: what makes one of a range's ends `[C]`.
    """
    found = [quantizer_of(*tails.range_of(percentile)) for percentile in PERCENTILES]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *found), jnp.zeros(
        (len(found), tails.low.shape[1])
    )


def squared_errors(
    quantizers: Uniform | LogSqrt2, x: Float[Array, "N C"], counts: Bool[Array, " N"]
) -> Float[Array, "P C"]:
    """The sum of the squared errors of each channel under each of some quantizers."""
    x = x.astype(jnp.float32)

    def error(quantizer: Uniform | LogSqrt2) -> Array:
        return jnp.sum((quantizer.decode(quantizer.encode(x)) - x) ** 2 * counts[:, None], 0)

    return jax.lax.map(error, quantizers)


@jax.jit
def best(quantizers: Uniform | LogSqrt2, errors: Float[Array, "P C"]) -> Uniform | LogSqrt2:
    """Of each channel that quantizer among some whose error is the least, the first of equals."""
    chosen = jnp.argmin(errors, axis=0)
    return jax.tree.map(lambda array: jnp.take_along_axis(array, chosen[None], 0)[0], quantizers)
