"""Super-Tuning: train the largest entries of each weight; Supra: with a low-rank matrix besides.

Paper: "Super-Tuning", 2026, arXiv 2607.09287.

    W' = W + S + s · aᵀb      S[i_k, o_k] = v_k at the K entries of the largest |W|, or of the smallest
                              a [r, in], b [r, out], s = alpha / r; only with a `rank`

Trained: v, a share 1 - `sparsity` of each weight, float32, 0 at first, and with a rank r·(in + out) more: a
is uniform, ±1/√in, b = 0. The entries are chosen once. Each layer forms W + S. Backward keeps x and the r
numbers x·aᵀ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.checks import fraction, positive
from peftjax.core.errors import PeftError
from peftjax.methods._options import DropoutOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight, dense
from peftjax.weights.canonical import to_canonical
from peftjax.weights.indexing import NOWHERE
from peftjax.weights.low_rank import LowRank
from peftjax.weights.sharding import whole
from peftjax.weights.sparse_entries import SparseEntries


@dataclass(frozen=True, kw_only=True)
class SupertuningOptions(DropoutOptions):
    """Those of `supertuning`.

    Attributes:
        sparsity: the share of the entries of each weight that is not trained.
        largest: whether the largest are trained; else the smallest.
        rank: r, of a low-rank matrix besides; by default there is none.
        alpha: numerator of its scale; by default 2·r.
    """

    sparsity: float = 0.99
    largest: bool = True
    rank: int | None = None
    alpha: float | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        fraction(caller, "sparsity", self.sparsity)
        positive(caller, "rank", self.rank)
        positive(caller, "alpha", self.alpha)
        for option in ("alpha", "dropout"):
            if self.rank is None and getattr(self, option):
                raise PeftError(
                    f"{caller}: {option} is that of a low-rank matrix; give a rank, or leave it out"
                )

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with its rank."""
        return super().find(caller, params, one_way=one_way, rank=self.rank or 1)


@register(
    kind="adapter",
    paper="Super-Tuning, 2026, arXiv 2607.09287",
    trains="K of the entries",
    backward_keeps="the input x",
    conformance=Conformance(example={"sparsity": 0.9, "rank": 1}),
)
@takes(SupertuningOptions)
def supertuning(options: SupertuningOptions) -> Transform:
    """Train the largest entries of the targeted weights (arXiv 2607.09287).

    Raises:
        PeftError: here for an option out of range; in `init` for targets or ranks that do not fit the
            parameters, or weights of which no entry is left.
    """

    def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
        (n, m), stack = target.layout.matrix, target.stack
        w = whole(to_canonical(dense(base), target.layout))
        w = w if target.layers is None else w[jnp.asarray(target.layers)]
        indices = _chosen(w, _count(target, options.sparsity), options.largest)
        trained = {"values": jnp.zeros(indices.shape)}
        if options.rank is not None:
            bound = 1.0 / math.sqrt(n)
            shape = (*stack, options.rank, n)
            trained["a"] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
            trained["b"] = jnp.zeros((*stack, options.rank, m))
        return trained, {"indices": indices}

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Weight:
        inputs, indices = target.layout.matrix[0], slots["indices"]
        rows = jnp.where(indices < 0, NOWHERE, indices % inputs)
        sparse = SparseEntries(base, slots["values"], rows, indices // inputs, target.layout, added=True)
        if options.rank is None:
            return sparse
        scale = 2.0 if options.alpha is None else options.alpha / options.rank
        return LowRank(sparse, slots["a"], slots["b"], target.layout, scale, options.dropout, keys)

    return of_weights(
        "supertuning",
        options,
        start,
        weight,
        neutral={"indices": -1},
        one_way=True,
        dropout=options.dropout,
    )


def _count(target: Target, sparsity: float) -> int:
    n, m = target.layout.matrix
    count = int(n * m * (1 - sparsity))
    if count < 1:
        raise PeftError(
            f"supertuning: sparsity {sparsity} leaves no entry of {target.path!r}, a matrix of {n} x {m}; "
            "lower it or exclude the weight"
        )
    if n * m >= 2**31:
        raise PeftError(
            f"supertuning: {target.path!r} has {n * m:,} entries, more than 32 bits number; exclude it"
        )
    return count


def _chosen(w: Array, count: int, largest: bool) -> Array:
    """The entries `[*stack, K]` of matrices `[*stack, in, out]`, by their numbers in `[out, in]`."""
    size = jnp.abs(w.swapaxes(-1, -2)).reshape(*w.shape[:-2], -1)
    return lax.top_k(size if largest else -size, count)[1].astype(jnp.int32)
