"""The options that say which weights a method takes, and those of methods with a rank or with dropout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftjax.core.checks import fraction, positive
from peftjax.core.targets import Targets
from peftjax.methods._targets import Target, find_targets


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which weights a method takes.

    Attributes:
        targets: a regular expression over whole names, a list of names or path suffixes, or
            'all-linear'. A weight answers to its own path and, called 'kernel', 'weight' or
            'embedding', to its module's.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layers: only these layers, by the number in the path or along the stacked axis.
        layers_pattern: the name of the list of layers, where paths hold several numbers.
        layouts: axes by pattern, a letter per axis: 's' stack, 'i' input, 'o' output.
    """

    targets: Targets = "all-linear"
    exclude: Targets | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | None = None
    layouts: Mapping[str, str] | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for; raises as `find_targets`."""
        return find_targets(
            params,
            caller=caller,
            rank=ranks.get("rank", 1),
            rank_pattern=ranks.get("rank_pattern"),
            targets=self.targets,
            exclude=self.exclude,
            layers=self.layers,
            layers_pattern=self.layers_pattern,
            layouts=self.layouts,
            one_way=one_way,
        )


@dataclass(frozen=True, kw_only=True)
class DropoutOptions(TargetOptions):
    """Those of a method with dropout.

    Attributes:
        dropout: on the adapter's input, when `apply` is given a key.
    """

    dropout: float = 0.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        fraction(caller, "dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class RankOptions(TargetOptions):
    """Those of a method with a rank.

    Attributes:
        rank: r; at most the smaller side of each weight.
        rank_pattern: rank by pattern; the first key that matches the end of a name wins.
    """

    rank: int = 8
    rank_pattern: Mapping[str, int] | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "rank", self.rank)

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its rank."""
        ranks = {"rank": self.rank, "rank_pattern": self.rank_pattern}
        return super().find(caller, params, one_way=one_way, **ranks)
