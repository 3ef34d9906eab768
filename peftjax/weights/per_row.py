"""Several low-rank adapters on one weight, each row of a batch using its own."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.errors import PeftError
from peftjax.weights.arrange import side_of
from peftjax.weights.base import Weight, canonical, contract, logical, static, structured
from peftjax.weights.layout import Layout
from peftjax.weights.rules import Dot, Gather, Rule


@structured
class PerRow(Weight):
    """`w_b = base + a[rows_b]ᵀ b[rows_b]` for row b of the batch; a row of -1 is the base alone.

    `a [*stack, n, r, in]`, `b [*stack, n, r, out]` (scales folded into b, smaller ranks padded with
    zeros), `rows [*stack, B]` int32. The batch is the first free axis of the activation, or flattened
    into it with the batch outermost.
    """

    base: Any = logical()
    a: Array = canonical("i")
    b: Array = canonical("o")
    rows: Array = canonical()
    layout: Layout = static()

    def dense(self) -> Array:
        """There is none: every row of the batch has a weight of its own."""
        raise PeftError(
            f"{self.layout.name}: adapters mixed per row have no single dense weight; merge one of them"
        )

    def supports(self, rule: Rule) -> bool:
        """Products and lookups with the batch in front, on one matrix."""
        if isinstance(rule, Dot):
            plain = not rule.weight_first and not rule.x_batch and 0 not in rule.x_contract
            return plain and not self.layout.stack and side_of(self.layout, rule.w_contract) is not None
        if isinstance(rule, Gather):
            return not self.layout.stack and side_of(self.layout, (rule.axis,)) is not None
        return False

    def dot(self, x: Array, rule: Dot) -> Array:
        """`x·base` plus, for each row, `(x·firstᵀ)·second` with its own thin factors."""
        side = side_of(self.layout, rule.w_contract)
        first, second, left = (self.a, self.b, "o") if side == "i" else (self.b, self.a, "i")
        entered = self.layout.positions(side)
        n_free = x.ndim - len(rule.x_contract)
        order = [rule.x_contract[rule.w_contract.index(p)] for p in entered]
        free = [n for n in range(x.ndim) if n not in rule.x_contract]
        rows = lax.transpose(x, (*free, *order))
        sizes = rows.shape[:n_free]
        thin = self._grouped(rows.reshape(*sizes, -1))  # [B, tokens of the row, in]
        choice, weight = self._choice(x.dtype)
        z = jnp.einsum("bti,bri->btr", thin, first[choice].astype(x.dtype), precision=rule.precision)
        y = jnp.einsum("btr,bro->bto", z * weight, second[choice].astype(x.dtype), precision=rule.precision)
        kept = self.layout.positions(left)
        y = y.reshape(*sizes, *(self.shape[p] for p in kept))
        y = lax.transpose(y, (*range(n_free), *(n_free + kept.index(p) for p in sorted(kept))))
        whole = contract(x, self.base, rule)
        return whole + y.reshape(whole.shape).astype(whole.dtype)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows plus each batch row's own `first[:, id]ᵀ·second`."""
        side = side_of(self.layout, (rule.axis,))
        first, second, left = (self.a, self.b, "o") if side == "i" else (self.b, self.a, "i")
        found = contract(indices, self.base, rule)
        ids = self._grouped(indices)[..., 0]  # [B, tokens of the row]
        choice, weight = self._choice(found.dtype)
        thin = first[choice[:, None], :, ids]  # [B, tokens, r]
        y = jnp.einsum("btr,bro->bto", thin * weight, second[choice])
        kept = self.layout.positions(left)
        lead = indices.ndim - 1
        y = y.reshape(*indices.shape[:-1], *(self.shape[p] for p in kept))
        y = lax.transpose(y, (*range(lead), *(lead + kept.index(p) for p in sorted(kept))))
        return found + y.reshape(found.shape).astype(found.dtype)

    def _grouped(self, x: Array) -> Array:
        """`[B·k, ..., n]` as `[B, tokens, n]`."""
        batch = self.rows.shape[-1]
        if x.shape[0] % batch:
            raise PeftError(
                f"{self.layout.name}: adapters are mixed over a batch of {batch} rows, but this layer "
                f"sees an activation {x.shape}; keep the batch axis first"
            )
        return x.reshape(batch, -1, x.shape[-1])

    def _choice(self, dtype: Any) -> tuple[Array, Array]:
        weight = (self.rows >= 0).astype(dtype)[:, None, None]
        return jnp.maximum(self.rows, 0), weight
