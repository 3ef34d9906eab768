"""How a basis of a gradient is found, for small matrices that are at hand."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from peftjax.methods.projected._refresh import OVERSAMPLING
from peftjax.optim.bases import Side, gram_basis, start_rows, subspace_iteration, svd_basis
from peftjax.optim.refresh import sides_of


@dataclasses.dataclass(frozen=True)
class Basis:
    """How a basis is found.

    Attributes:
        label: in the tables.
        method: as GaLore calls it.
        iterations: of a subspace iteration.
    """

    label: str
    method: Literal["svd", "gram", "subspace"]
    iterations: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """For `pj.galore`."""
        return {"basis": self.method, "iterations": self.iterations}

    def find(self, g: Array, rank: int, side: Side, key: Array, known: Array | None = None) -> Array:
        """The basis `[*stack, rank, in or out]` of `g [*stack, in, out]`; a known one is where it starts."""
        if self.method == "svd":
            return svd_basis(g, rank, side)
        if self.method == "gram":
            return gram_basis(g, rank, side)
        entering = g if side == "input" else jnp.matrix_transpose(g)
        rows = min(rank + OVERSAMPLING, *g.shape[-2:])
        start = start_rows(key, (*g.shape[:-2], rows, entering.shape[-2]), known)
        leaving = jnp.matrix_transpose(entering)
        return subspace_iteration(lambda q: q @ entering, lambda w: w @ leaving, start, self.iterations, rank)


BASES = (
    Basis("SVD", "svd"),
    Basis("Gram", "gram"),
    *(Basis(f"subspace, {count}", "subspace", count) for count in (0, 1, 2)),
)


def compressed_side(g: Array | jax.ShapeDtypeStruct) -> Side:
    """The smaller side, of a square matrix the input side."""
    (side,) = sides_of("smaller", *g.shape[-2:])
    return side
