"""FRoD: a weight between a basis that its layers share and one of its own, the values between them trained.

Paper: "FRoD", AAAI 2026, doi 10.1609/aaai.v40i31.39813.

    W = V·diag(l₀)·U      V [in, in] of all layers of one name, U [in, out] with rows of length 1, l₀ [in]
    W' = W + V·(Sᵀ + diag(l - l₀))·U       S sparse, its places the same in all layers, none on the diagonal

Trained: l, l₀ at first, and the values of S, 0 at first: in + density·in² numbers a weight, float32. V is
that of a generalized singular value decomposition of the layers together. U is not stored: diag(l₀)·U is
V⁻¹·W, formed in its layer, and V and its inverse lie once beside each group of layers. Backward keeps x.
Defaults are those of the usual PyTorch library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core.checks import fraction, positive
from peftjax.methods._options import DropoutOptions
from peftjax.methods._pools import PooledTarget, in_pools, numbered, of_pool, pooled
from peftjax.methods._targets import Target
from peftjax.methods._weights import Share, Slots, Start, of_weights
from peftjax.methods.lowrank._base import base_matrices
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.added import Added

NEGLIGIBLE = 1e-6
"""The share of the largest singular value below which a basis has no direction."""
NO_DIRECTION = 1e-5
"""The share of the largest l₀ below which a weight has none."""


@dataclass(frozen=True, kw_only=True)
class FrodOptions(DropoutOptions):
    """Those of `frod`.

    Attributes:
        density: the share of the entries of S that are trained.
        ridge: what keeps the decomposition stable where layers are alike.
    """

    density: float = 0.01
    ridge: float = 1e-3

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        fraction(caller, "density", self.density)
        positive(caller, "ridge", self.ridge)

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for, with those that it shares a basis with."""
        found = super().find(caller, params, one_way=one_way, **ranks)
        return [*pooled(found, lambda target: target.layout.matrix[0], layers_pattern=self.layers_pattern)]

    def count(self, n: int) -> int:
        """How many values S has of n inputs."""
        most = n * (n - 1)
        return max(min(int(n * n * self.density), most), 1 if self.density > 0.0 and most else 0)


@register(
    kind="adapter",
    paper="FRoD, 2026, doi 10.1609/aaai.v40i31.39813",
    trains="in + density·in²",
    backward_keeps="the input x (shared)",
    conformance=Conformance(example={"density": 0.3}),
)
@takes(FrodOptions)
def frod(options: FrodOptions) -> Transform:
    """Train the values of a weight in a basis that layers share (doi 10.1609/aaai.v40i31.39813).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.
    """

    def begin(leaves: Mapping[str, Any], targets: Sequence[Target]) -> tuple[Share, Start]:
        bases: dict[int, Slots] = {}
        for pool, group in in_pools(targets).items():
            matrices = [w for own in group for w in _each(base_matrices(own, leaves[own.path]))]
            v = joint_basis(matrices, options.ridge)
            bases[pool] = {"v": v, "inverse": jnp.linalg.pinv(v, rtol=NEGLIGIBLE)}

        def share(key: Array, targets: Sequence[Target]) -> tuple[Slots, Slots]:
            kept: Slots = {}  # "given" says whether the basis is that of a file
            for pool, own in bases.items():
                n = len(own["v"])
                places = _places(jax.random.fold_in(key, pool), n, options.count(n))
                kept |= numbered({**own, "places": places, "given": jnp.zeros((), bool)}, pool)
            return {}, kept

        def start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
            assert isinstance(target, PooledTarget)
            own = bases[target.pool]
            l0 = jnp.linalg.norm(own["inverse"] @ base_matrices(target, base), axis=-1)
            values = jnp.zeros((*target.stack, options.count(len(own["v"]))))
            return {"l": l0, "values": values}, {"l0": jnp.copy(l0)}

        return share, start

    def weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Added:
        own = {name: slots[name] for name in ("l", "values", "l0")}
        shared = {name: of_pool(slots, target)[name] for name in ("v", "inverse", "places")}
        return Added(base, own, target.layout, _change, True, options.dropout, keys, shared)

    return of_weights("frod", options, None, weight, begin=begin, dropout=options.dropout, one_way=True)


def joint_basis(matrices: Sequence[Array], ridge: float) -> Array:
    """V `[n, n]` of matrices `[n, m]`: of their generalized singular value decomposition together."""
    rows = jnp.concatenate([w.T for w in matrices])
    n = rows.shape[1]
    if len(rows) < n:
        return jnp.linalg.svd(rows, full_matrices=True)[2].T
    q, r = jnp.linalg.qr(rows)
    ends = np.cumsum([w.shape[1] for w in matrices])[:-1].tolist()
    inverses = [jnp.linalg.inv(own.T @ own + ridge * jnp.eye(n)) for own in jnp.split(q, ends)]
    mean = sum(inverses[1:], inverses[0]) / len(inverses)
    return r.T @ jnp.linalg.eigh(mean)[1]


def _each(w: Array) -> list[Array]:
    """The matrices of a stack."""
    return [*w.reshape(-1, *w.shape[-2:])]


def _places(key: Array, n: int, count: int) -> Array:
    """Rows and columns `[2, count]` off the diagonal, no two the same."""
    chosen = jax.random.permutation(key, n * (n - 1))[:count]
    rows, columns = chosen // max(n - 1, 1), chosen % max(n - 1, 1)
    return jnp.stack([rows, columns + (columns >= rows)]).astype(jnp.int32)


def _change(slots: Mapping[str, Array], base: Array) -> Array:
    """`V·(Sᵀ + diag(l - l₀))·U` of one matrix `[n, m]`."""
    l0, (rows, columns) = slots["l0"], slots["places"]
    # A direction that the weight does not have would be noise of length 1.
    some = l0 > NO_DIRECTION * jnp.max(l0)
    u = slots["inverse"] @ base * jnp.where(some, 1.0 / jnp.where(some, l0, 1.0), 0.0)[:, None]
    between = jnp.diag(slots["l"] - l0).at[columns, rows].add(slots["values"])
    return slots["v"] @ (between @ u)
