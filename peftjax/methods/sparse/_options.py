"""The options of the methods whose sparse update is recomputed from two factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftjax.core.checks import fraction, positive
from peftjax.core.targets import Targets


@dataclass(frozen=True, kw_only=True)
class KernelizedOptions:
    """What all of them take.

    Attributes:
        rank: r, over all heads together.
        heads: P; divides every rank.
        coefficient: c.
        targets: as in `lora`.
        exclude: as in `lora`.
        layers: as in `lora`.
        layers_pattern: as in `lora`.
        rank_pattern: as in `lora`.
        layouts: as in `lora`.
        dropout: on the input of the updates, when `apply` is given a key.
    """

    rank: int = 8
    heads: int = 2
    coefficient: float = 0.1
    targets: Targets = "all-linear"
    exclude: Targets | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | None = None
    rank_pattern: Mapping[str, int] | None = None
    layouts: Mapping[str, str] | None = None
    dropout: float = 0.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        positive(caller, "rank", self.rank)
        positive(caller, "heads", self.heads)
        fraction(caller, "dropout", self.dropout)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The heads' fixed coefficients, of alternating sign."""
        return tuple(self.coefficient * (-1.0) ** head for head in range(self.heads))
