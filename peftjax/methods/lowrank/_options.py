"""The options of the methods whose weights are `base + scale · aᵀb`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from peftjax.core.checks import one_of
from peftjax.methods._options import DropoutOptions, RankOptions
from peftjax.methods.lowrank._factors import (
    Bias,
    Start,
    start_gaussian,
    start_orthogonal,
    start_uniform,
    start_zero_a,
)

STARTS: dict[str, Start] = {
    "uniform": start_uniform,
    "gaussian": start_gaussian,
    "orthogonal": start_orthogonal,
    "zero_a": start_zero_a,
}


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(DropoutOptions, RankOptions):
    """What all of them take.

    Attributes:
        alpha: numerator of the scale.
        alpha_pattern: alpha by pattern.
        bias: train no bias ('none'), those of the adapted modules ('adapted'), or all; 'added' gives adapted
            linear layers and convolutions that have none a bias too, which cannot be merged into the model.
    """

    alpha: float = 16.0
    alpha_pattern: Mapping[str, float] | None = None
    bias: Bias = "none"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "bias", self.bias, get_args(Bias))


@dataclass(frozen=True, kw_only=True)
class StartOptions(LowRankOptions):
    """Those of a method whose factors can start in several ways.

    Attributes:
        init: how `a` starts while `b = 0`; 'zero_a' starts with `a = 0` and a uniform `b`, 'orthogonal' both
            with product zero, which needs an even r.
    """

    init: Literal["uniform", "gaussian", "orthogonal", "zero_a"] = "uniform"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        one_of(caller, "init", self.init, STARTS)

    @property
    def start(self) -> Start:
        """The factors and base at the beginning."""
        return STARTS[self.init]


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(LowRankOptions):
    """Those of a method whose scale can be rsLoRA's.

    Attributes:
        rslora: scale by alpha / sqrt(r) (arXiv 2312.03732).
    """

    rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraOptions(ScaleOptions, StartOptions):
    """Those of `lora`."""
