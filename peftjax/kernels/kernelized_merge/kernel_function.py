"""Which function of the two factors a weight update is, and what must be given to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from jax import Array

from peftjax.core.errors import PeftError

Kernel = Literal["distance", "linear", "sigmoid", "rbf"]
Mode = Literal["released", "paper", "hard", "none"]


@dataclass(frozen=True)
class KernelFunction:
    """`dW[i, j] = Σ_p coefficients[p] · kernel(a[p, :, i], b[p, :, j])`, and what is kept of it.

    kernel: `distance` |x - x'|; `linear` x·x'; `sigmoid` scale/(1 + exp(-rate x·x')) + shift; `rbf`
    scale·exp(-rate |x - x'|²) + shift.
    mode, with t the threshold: `released` dW·|dW|·1[|dW| > t]; `paper` dW·max(|dW| - t, 0); `hard`
    dW·1[|dW| > t]; `none` dW. The factor beside dW and t are never differentiated.
    mixed: `dW = D + alpha·softmax_j(D/gamma) + beta` of the distances D, the softmax over outputs.

    Raises `PeftError` for a name that is none of these, no coefficients, or `mixed` without distances.
    """

    kernel: Kernel = "distance"
    coefficients: tuple[float, ...] = (0.1, -0.1)
    mode: Mode = "released"
    mixed: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("kernel", get_args(Kernel)), ("mode", get_args(Mode))):
            if getattr(self, name) not in allowed:
                raise PeftError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if not self.coefficients:
            raise PeftError("coefficients is empty; give one number per head.")
        if self.mixed and self.kernel != "distance":
            raise PeftError(f"mixed needs kernel='distance'; the kernel is {self.kernel!r}.")

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of the trained scalars, one number per matrix each."""
        if self.mixed:
            return ("alpha", "gamma", "beta")
        return ("scale", "rate", "shift") if self.kernel in ("sigmoid", "rbf") else ()

    @property
    def of_distance(self) -> bool:
        """Whether the kernel sees its arguments only through |x - x'|."""
        return self.kernel in ("distance", "rbf")


def check(
    a: Array, b: Array, scalars: Mapping[str, Array], per_matrix: Array, kernel_function: KernelFunction
) -> None:
    """Raise `PeftError` unless shapes, heads and scalars fit each other and the kernel function."""
    stack = a.shape[:-3]
    if a.ndim < 3 or b.shape[:-1] != a.shape[:-1]:
        raise PeftError(
            f"a is {a.shape} and b {b.shape}; they must be [*stack, heads, rank, inputs] and [.., outputs]."
        )
    heads, names = len(kernel_function.coefficients), kernel_function.scalars
    if a.shape[-3] != heads:
        raise PeftError(f"a has {a.shape[-3]} heads and the kernel function {heads} coefficients.")
    if set(scalars) != set(names):
        raise PeftError(
            f"the kernel function needs the scalars {sorted(names)} and was given {sorted(scalars)}."
        )
    for name, value in {**scalars, "threshold or level": per_matrix}.items():
        if value.shape != stack:
            raise PeftError(f"{name} has the shape {value.shape}; one number per matrix is {stack}.")
    if math.prod((a.shape[-1], b.shape[-1])) >= 2**31:
        raise PeftError(f"a matrix of {a.shape[-1]} x {b.shape[-1]} has more entries than an int32 counts.")
