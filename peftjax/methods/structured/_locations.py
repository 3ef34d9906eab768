"""Where the numbers of a sparse spectrum lie: fixed places, drawn from a seed for a weight's shape."""

import functools
from dataclasses import dataclass

import numpy as np

from peftjax.core.checks import at_least, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target

_LARGEST = (2**32 - 1) // 20
"""From this size on PyTorch shuffles in another way, of which each number needs all draws."""


@dataclass(frozen=True, kw_only=True)
class SpectrumOptions(TargetOptions):
    """Those of a method that trains some numbers of a spectrum.

    Attributes:
        count: K, how many numbers are trained of each weight.
        scale: of the update.
        seed: of their places, which are the same for weights of one shape, in this and in other models.
    """

    count: int = 1000
    scale: float = 150.0
    seed: int = 777

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "count", self.count)
        at_least(caller, "seed", self.seed, 0)

    def require_fits(self, caller: str, target: Target) -> None:
        """Raise a PeftError for a weight of fewer numbers, or more than can be shuffled as PyTorch does."""
        n, m = target.layout.matrix
        if self.count > n * m:
            raise PeftError(
                f"{caller}: count {self.count} is larger than {target.path!r}, a matrix of {n} x {m}; lower "
                "it or exclude the weight"
            )
        if n * m >= _LARGEST:
            raise PeftError(
                f"{caller}: {target.path!r} has {n * m:,} numbers, and from {_LARGEST:,} on the places "
                "cannot be drawn as PyTorch draws them; exclude it"
            )


@functools.lru_cache(maxsize=256)
def locations(seed: int, size: int, count: int) -> np.ndarray:
    """The first so many numbers of a permutation of `range(size)`, as `torch.randperm` draws it on a CPU.

    Of the Fisher-Yates shuffle only what these numbers need is done: `count` steps, whatever the size.
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)
    moved: dict[int, int] = {}
    found = []
    for place in range(count):
        other = place + int(draws[place]) % (size - place)
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return np.array(found, np.int64)
