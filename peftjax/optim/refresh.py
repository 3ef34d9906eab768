"""The bases of one gradient: which sides they compress, how they are refreshed, and the projection both ways.

    compress      bases                              projected gradient R           back
    input         P [*stack, r, in]                  P G       [*stack, r, out]     Pᵀ R
    output        Q [*stack, r, out]                 Q Gᵀ      [*stack, r, in]      Rᵀ Q
    both          P and Q                            P G Qᵀ    [*stack, r, r]       Pᵀ R Q

'auto' takes, for a compressed side n, a kept side m and rank r: 'subspace' where n >= 512 and r <= n / 8,
else 'gram' where n <= m, else 'svd'; `docs/results/projected.md` has the timings behind it. The subspace
iteration starts at the previous basis, with 8 more random rows, and makes 2 iterations.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from peftjax.core import tree
from peftjax.core.checks import one_of, positive
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, require_patterns_used
from peftjax.optim.bases import (
    Side,
    gram_basis,
    orthonormal_rows,
    pointed,
    start_rows,
    subspace_iteration,
    svd_basis,
)
from peftjax.optim.matrices import select_matrices
from peftjax.optim.updates import require_known
from peftjax.weights.layout import Layout, layout_of

Compressed = Literal["smaller", "larger", "input", "output", "both"]
Method = Literal["auto", "svd", "gram", "subspace"]
Signs = Literal["largest", "decomposition"]
Bases = dict[Side, Array]
_EXACT = lax.Precision.HIGHEST
_OVERSAMPLING, _ITERATIONS = 8, 2


@dataclass(frozen=True)
class Projected:
    """One projected weight: the static facts, known before training."""

    path: str
    layout: Layout
    rank: int
    sides: tuple[Side, ...]
    """The compressed sides, 'input' first."""

    @property
    def first(self) -> Side:
        """The side whose basis is found first, by decomposition; of two, the smaller."""
        n_in, n_out = self.layout.matrix
        return self.sides[0] if len(self.sides) == 1 or n_in <= n_out else "output"

    def width(self, side: Side) -> int:
        """The size of the matrix on a side."""
        return self.layout.matrix[0 if side == "input" else 1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the projected gradient."""
        kept = {("input",): self.width("output"), ("output",): self.width("input")}
        return (*self.layout.stack, self.rank, kept.get(self.sides, self.rank))


def find_projected(
    params: Any,
    rank: int,
    compress: Compressed,
    targets: Targets,
    exclude: Targets | None,
    layouts: Mapping[str, str] | None,
    strict: bool = True,
) -> dict[str, Projected]:
    """The weights that are projected, by path; ranks cut to the smaller side of each.

    Raises:
        PeftError: the targets or the layouts match nothing.
    """
    leaves = tree.named_leaves(params)
    paths = select_matrices(params, targets, caller="project", exclude=exclude, strict=strict)
    require_patterns_used("project", layouts, paths)
    found = {}
    for path in paths:
        layout = layout_of(path, leaves, layouts)
        sides = sides_of(compress, *layout.matrix)
        found[path] = Projected(path, layout, min(rank, *layout.matrix), sides)
    return found


def sides_of(compress: Compressed, n_in: int, n_out: int) -> tuple[Side, ...]:
    """The compressed sides of a matrix `[in, out]`; of a square one the input side, as released."""
    if compress == "both":
        return ("input", "output")
    if compress == "smaller":
        return ("input",) if n_in <= n_out else ("output",)
    if compress == "larger":
        return ("input",) if n_in >= n_out else ("output",)
    return (compress,)


def require_options(rank: int, every: int, compress: str, method: str, signs: str) -> None:
    """Raise a PeftError for an option out of range."""
    require_known("project", rank=rank)
    positive("project", "rank", rank)
    positive("project", "every", every)
    one_of("project", "side", compress, get_args(Compressed))
    one_of("project", "basis", method, get_args(Method))
    one_of("project", "signs", signs, get_args(Signs))


def require_one_side(caller: str, compress: str) -> None:
    """Raise a PeftError for what needs a side that is not compressed."""
    if compress == "both":
        raise PeftError(f"{caller}: one side of each matrix is compressed; side cannot be 'both'")


def zero_bases(leaf: Projected, dtype: DTypeLike) -> Bases:
    """The bases before the first refresh."""
    return {side: jnp.zeros((*leaf.layout.stack, leaf.rank, leaf.width(side)), dtype) for side in leaf.sides}


def project(g: Array, bases: Bases) -> Array:
    """R of `g [*stack, in, out]`, see the module; computed and returned in float32."""
    g = g.astype(jnp.float32)
    p, q = (bases[side].astype(jnp.float32) if side in bases else None for side in ("input", "output"))
    if p is None:
        return jnp.matmul(q, jnp.matrix_transpose(g), precision=_EXACT)
    r = jnp.matmul(p, g, precision=_EXACT)
    return r if q is None else jnp.matmul(r, jnp.matrix_transpose(q), precision=_EXACT)


def back(r: Array, bases: Bases) -> Array:
    """The matrices `[*stack, in, out]`, float32, that a projected array stands for."""
    r = r.astype(jnp.float32)
    p, q = (bases[side].astype(jnp.float32) if side in bases else None for side in ("input", "output"))
    if p is None:
        return jnp.matmul(jnp.matrix_transpose(r), q, precision=_EXACT)
    r = r if q is None else jnp.matmul(r, q, precision=_EXACT)
    return jnp.matmul(jnp.matrix_transpose(p), r, precision=_EXACT)


def refreshed_bases(
    g: Array, leaf: Projected, before: Bases, method: Method, count: Array, signs: Signs = "largest"
) -> Bases:
    """The bases after a refresh by a gradient `[*stack, in, out]`.

    Of two, the second is the orthonormal rows of P G (or Q Gᵀ): the other singular vectors, up to signs.

    Args:
        g: the gradient.
        leaf: the weight whose gradient it is.
        before: the previous bases, where a subspace iteration starts.
        method: 'auto', 'svd', 'gram' or 'subspace', see the module.
        count: steps done; with the path, the seed of the random rows.
        signs: of the rows: their largest entries positive, or as the decomposition gives them.
    """
    side = leaf.first
    kind = method_for(leaf, method)
    if kind == "subspace":
        found = {side: _iterated(g, leaf, before[side], count)}
    else:
        found = {side: {"svd": svd_basis, "gram": gram_basis}[kind](g, leaf.rank, side)}
    for other in leaf.sides:
        if other not in found:
            found[other] = orthonormal_rows(project(g, found))
    if signs == "largest":
        found = {side: pointed(rows) for side, rows in found.items()}
    return {side: found[side].astype(before[side].dtype) for side in leaf.sides}


def method_for(leaf: Projected, method: Method) -> Method:
    """How a basis is found: for 'auto' by the sizes, see the module."""
    if method != "auto":
        return method
    n = leaf.width(leaf.first)
    if n >= 512 and leaf.rank <= n // 8:
        return "subspace"
    return "gram" if n == min(leaf.layout.matrix) else "svd"


def _iterated(g: Array, leaf: Projected, before: Array, count: Array) -> Array:
    rows = min(leaf.rank + _OVERSAMPLING, *leaf.layout.matrix)
    key = jax.random.fold_in(jax.random.key(zlib.crc32(leaf.path.encode())), count)
    start = start_rows(key, (*leaf.layout.stack, rows, leaf.width(leaf.first)), before)
    g = g.astype(jnp.float32)
    across, along = (g, jnp.matrix_transpose(g)) if leaf.first == "input" else (jnp.matrix_transpose(g), g)

    def by(matrix: Array) -> Callable[[Array], Array]:
        return lambda q: jnp.matmul(q, matrix, precision=_EXACT)

    return subspace_iteration(by(across), by(along), start, _ITERATIONS, leaf.rank)
