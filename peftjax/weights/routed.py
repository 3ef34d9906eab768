"""Several low-rank adapters on one weight, of which every token takes those nearest to it."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.errors import PeftError
from peftjax.weights.base import Weight, contract
from peftjax.weights.canonical import side_of
from peftjax.weights.contraction import Contraction, Dot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout


@structured
class Routed(Weight):
    """`y = x·base + Σ_e c_e (x·a_eᵀ)·b_e` with `c = softmax(top_k |x·p_e| / temperature)`, of each token.

    `a [*stack, E, r, in]`, `b [*stack, E, r, out]` (scales folded in), prototypes `p [*stack, E, in]`. Those
    that are not among the k nearest have no share.
    """

    has_dense: ClassVar[bool] = False

    base: Any = logical()
    a: Array = canonical("i")
    b: Array = canonical("o")
    prototypes: Array = canonical("i")
    layout: Layout = static()
    top_k: int = static()
    temperature: float = static()

    def dense(self) -> Array:
        """There is none: every token has a weight of its own."""
        raise PeftError(
            f"{self.layout.name}: adapters that tokens are routed to have no merged weight; merge one of "
            "them, or their sum (pj.adapters.add)"
        )

    def supports(self, rule: Contraction) -> bool:
        """Products of one matrix with its inputs."""
        if not isinstance(rule, Dot) or rule.weight_first or rule.x_batch or self.layout.stack:
            return False
        return side_of(self.layout, rule.w_contract) == "i"

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product and the weighed ones of the adapters, two thin products in all."""
        entered, left = self.layout.positions("i"), self.layout.positions("o")
        order = [rule.x_contract[rule.w_contract.index(p)] for p in entered]
        free = [n for n in range(x.ndim) if n not in rule.x_contract]
        rows = lax.transpose(x, (*free, *order))
        sizes = rows.shape[: len(free)]
        rows = rows.reshape(*sizes, -1)
        z = jnp.einsum("...i,eri->...er", rows, self.a.astype(x.dtype), precision=rule.precision)
        z = z * self._shares(rows)[..., None].astype(x.dtype)
        y = jnp.einsum("...er,ero->...o", z, self.b.astype(x.dtype), precision=rule.precision)
        y = y.reshape(*sizes, *(self.shape[p] for p in left))
        y = lax.transpose(y, (*range(len(free)), *(len(free) + left.index(p) for p in sorted(left))))
        whole = contract(x, self.base, rule)
        return whole + y.reshape(whole.shape).astype(whole.dtype)

    def _shares(self, rows: Array) -> Array:
        """c, `[..., E]`, float32."""
        near = jnp.abs(jnp.einsum("...i,ei->...e", rows.astype(jnp.float32), self.prototypes))
        _, chosen = lax.top_k(near, self.top_k)
        taken = jax.nn.one_hot(chosen, near.shape[-1], dtype=bool).any(axis=-2)
        return jax.nn.softmax(jnp.where(taken, near / self.temperature, -jnp.inf), axis=-1)
