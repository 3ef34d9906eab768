"""The options of the methods whose weights are `base + scale · aᵀb`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peftjax.core.checks import fraction, one_of, positive
from peftjax.core.targets import Targets
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
class LowRankOptions:
    """What all of them take.

    Attributes:
        rank: r; at most the smaller side of each weight.
        alpha: numerator of the scale.
        targets: a regular expression over whole names, a list of names or path suffixes, or
            'all-linear'. A weight answers to its own path and, called 'kernel', 'weight' or
            'embedding', to its module's.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layers: only these layers, by the number in the path or along the stacked axis.
        layers_pattern: the name of the list of layers, where paths hold several numbers.
        rank_pattern: rank by pattern; the first key that matches the end of a name wins.
        alpha_pattern: alpha by pattern.
        layouts: axes by pattern, a letter per axis: 's' stack, 'i' input, 'o' output.
        bias: train no bias ('none'), those of the adapted modules ('adapted'), or all; 'added' gives adapted
            linear layers and convolutions that have none a bias too, which cannot be merged into the model.
        dropout: on the adapter's input, when `apply` is given a key.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Targets = "all-linear"
    exclude: Targets | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    layouts: Mapping[str, str] | None = None
    bias: Bias = "none"
    dropout: float = 0.0

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        positive(caller, "rank", self.rank)
        one_of(caller, "bias", self.bias, get_args(Bias))
        fraction(caller, "dropout", self.dropout)


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
