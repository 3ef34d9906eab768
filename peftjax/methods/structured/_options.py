"""The options that several structured methods share."""

from collections.abc import Mapping
from dataclasses import dataclass

from peftjax.core.checks import positive
from peftjax.core.targets import pattern_value
from peftjax.methods._options import RankOptions
from peftjax.methods._targets import Target


@dataclass(frozen=True, kw_only=True)
class ScaledOptions(RankOptions):
    """Those of a method with a rank whose update is scaled by `alpha / rank`.

    Attributes:
        alpha: numerator of the scale.
        alpha_pattern: alpha by pattern.
    """

    alpha: float = 16.0
    alpha_pattern: Mapping[str, float] | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "alpha", self.alpha)

    def scale_of(self, target: Target) -> float:
        """The scale of a target's update."""
        return pattern_value(target.path, self.alpha_pattern, self.alpha) / target.rank
