"""What both kernels are given."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Operands(NamedTuple):
    """The arrays of one attention, None where there is no such thing; N is a multiple of K."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    mask: Bool[Array, "B S"] | None
    """True where a key is a token."""
    segments: Int[Array, "B S"] | None
    """A query sees the keys of its own segment."""
    window: Int[Array, ""] | None
    """The layer's width among `Scores.windows`, where these are several."""
    sinks: Float[Array, " N"] | None
    """Scores of no key, which take their share of the softmax."""


@dataclass(frozen=True)
class Scores:
    """What is static of the scores `c(s Q K^T)`.

    Attributes:
        scale: `s`.
        softcap: bound of the scores, or None.
        causal: only keys that are not later are seen.
        windows: the widths that the window may have, None is all; one alone is the window.
    """

    scale: float
    softcap: float | None = None
    causal: bool = False
    windows: tuple[int | None, ...] = (None,)
