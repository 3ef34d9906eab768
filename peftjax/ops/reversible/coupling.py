"""How two streams meet in a reversible layer, and where pairs of them are kept."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float

Pair = tuple[Float[Array, "..."], Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class Coupling:
    """How the two streams meet in a layer.

    Attributes:
        lam: λ.
        beta: β.
        swap: whether the two change places after a layer.
    """

    lam: float
    beta: float
    swap: bool

    def forward(self, f: Callable[[Array], Array], g: Callable[[Array], Array], pair: Pair) -> Pair:
        """The streams after a layer."""
        x1, x2 = pair
        y1 = self.lam * x1 + f(x2)
        y2 = self.beta * x2 + g(y1)
        return self.ordered((y1, y2))

    def before_g(self, y2: Array, of_g: Array) -> Array:
        """`x2 = (y2 - G(y1)) / β`."""
        return (y2 - of_g) * (1.0 / self.beta)

    def before_f(self, y1: Array, of_f: Array) -> Array:
        """`x1 = (y1 - F(x2)) / λ`."""
        return (y1 - of_f) * (1.0 / self.lam)

    def ordered(self, pair: Pair) -> Pair:
        """`(y1, y2)` as the next layer takes them, and the other way round."""
        return pair[::-1] if self.swap else pair


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a reversible stack.

    Attributes:
        coupling: of the streams.
        length: L.
        every: layers between two kept pairs, 1 to L.
        num_shared: how many of the flat operands all layers share.
    """

    coupling: Coupling
    length: int
    every: int
    num_shared: int

    @property
    def num_kept(self) -> int:
        """How many pairs are kept."""
        return -(-self.length // self.every)

    def slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each layer, where the pair after it goes, and where and whether the pair before it is kept.

        Pairs of layers that share a slot overwrite each other, so that the last one stays.
        """
        left = self.length - np.arange(self.length)  # layers from this one on
        after, before = ((self.num_kept - 1 - n // self.every).astype(np.int32) for n in (left - 1, left))
        kept = (left % self.every == 0) & (left < self.length)
        return after, np.maximum(before, 0), kept

    def split(self, operands: Sequence[Any]) -> tuple[Any, list[Any], list[Any]]:
        """The operands as (pair of streams, shared, stacked)."""
        end = 2 + self.num_shared
        return tuple(operands[:2]), list(operands[2:end]), list(operands[end:])
