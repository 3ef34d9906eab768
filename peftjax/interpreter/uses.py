"""A weight that is used several times gets a new dropout mask for each use."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peftjax.weights.base import Weight
from peftjax.weights.dropout import with_number


@dataclass(frozen=True)
class Uses:
    """How often the weights of each name were used in one jaxpr, which lies `depth` equations deep.

    The key of a first use is the weight's own; a later use has its number and depth folded in, and so has
    the weight that enters an equation a second time. Steps of a loop (below 2^31) are folded in by the
    loop. No two uses then fold in the same numbers in the same order.
    """

    depth: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def told_apart(self, operands: Sequence[Any]) -> list[Any]:
        """The operands of one equation, the keys of their weights other than in earlier equations."""
        return [self._next(value) if draws(value) else value for value in operands]

    def _next(self, weight: Weight) -> Weight:
        earlier = self.counts[weight.layout.name]
        self.counts[weight.layout.name] += 1
        number = 2**31 + (self.depth % 2**11) * 2**20 + earlier % 2**20
        return weight.with_keys(partial(with_number, number=number)) if earlier else weight


def draws(value: Any) -> bool:
    """Whether the value is a weight with dropout at work."""
    return isinstance(value, Weight) and value.draws
