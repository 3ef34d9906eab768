"""The options of the methods that train in projected gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from peftjax.core.checks import at_least, one_of, positive
from peftjax.core.targets import Targets
from peftjax.methods.projected._projected import Write
from peftjax.optim.refresh import Method


@dataclass(frozen=True, kw_only=True)
class ProjectedOptions:
    """What all of them take.

    Attributes:
        rank: r; at most the smaller side of each weight.
        every: T, steps between two refreshes of the projection.
        scale: of the projected update; the learning rate of these weights is scale · lr.
        basis: how a projector is found: 'svd' and 'gram' decompose the gradient, 'subspace' iterates on
            products with it; 'auto' chooses by size as `peftjax.optim.refresh` says.
        iterations: of 'subspace', 2 gradient passes each.
        together: how many parameters get their bases in one program, None for all: fewer need less memory,
            that of their gradients ('svd', 'gram') or of a few rows for each ('subspace'), and more passes.
        targets: as in `lora`.
        exclude: as in `lora`.
        rank_pattern: rank by pattern.
        layouts: axes by pattern.
        train_rest: train all other floating-point parameters as they are; else they are frozen.
        write: when Z is folded into the weights: at each 'refresh', or at each 'step', which holds no Z
            between steps.
        dtype: of projectors and Z, and so of the optimizer's state: 'float32' or 'bfloat16'.
    """

    rank: int = 128
    every: int = 200
    scale: float = 0.25
    basis: Method = "auto"
    iterations: int = 2
    together: int | None = None
    targets: Targets = "all-linear"
    exclude: Targets | None = None
    rank_pattern: Mapping[str, int] | None = None
    layouts: Mapping[str, str] | None = None
    train_rest: bool = True
    write: Write = "refresh"
    dtype: str = "float32"

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        for name in ("rank", "every", "together", "scale"):
            positive(caller, name, getattr(self, name))
        at_least(caller, "iterations", self.iterations, 0)
        one_of(caller, "basis", self.basis, get_args(Method))
        one_of(caller, "write", self.write, get_args(Write))
        one_of(caller, "dtype", self.dtype, ("float32", "bfloat16"))
