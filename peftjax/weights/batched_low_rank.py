"""Several low-rank adapters on one weight, each row of a batch using its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from peftjax.core.errors import PeftError
from peftjax.weights.base import Weight, contract
from peftjax.weights.canonical import side_of
from peftjax.weights.contraction import Contraction, Dot, Gather
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.layout import Layout


@structured
class BatchedLowRank(Weight):
    """`w_b = base + a[rows_b]ᵀ b[rows_b]` for row b of the batch; a row of -1 is the base alone.

    `a [*stack, n, r, in]`, `b [*stack, n, r, out]` (scales folded into b, smaller ranks padded with
    zeros), `rows [*stack, B]` int32, which `shard_map` divides over the axes `over` of the mesh. The
    batch is the free axis `axis` of the activation, or the first one, with the batch outermost where that
    is 0 and innermost where it is 1, when the model has flattened batch and tokens. Without `axis` it is
    the one free axis of B members; none or several are an error.
    """

    base: Any = logical()
    a: Array = canonical("i")
    b: Array = canonical("o")
    rows: Array = canonical()
    layout: Layout = static()
    axis: int | None = static(default=None)
    over: Any = static(default=None)

    def dense(self) -> Array:
        """There is none: every row of the batch has a weight of its own."""
        raise PeftError(
            f"{self.layout.name}: adapters mixed per row have no single dense weight; merge one of them"
        )

    def supports(self, rule: Contraction) -> bool:
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
        assert side is not None
        first, second, left = (self.a, self.b, "o") if side == "i" else (self.b, self.a, "i")
        entered = self.layout.positions(side)
        n_free = x.ndim - len(rule.x_contract)
        order = [rule.x_contract[rule.w_contract.index(p)] for p in entered]
        free = [n for n in range(x.ndim) if n not in rule.x_contract]
        rows = lax.transpose(x, (*free, *order))
        sizes = rows.shape[:n_free]
        thin, ungroup = self._grouped(rows.reshape(*sizes, -1))  # [B, tokens of the row, in]
        choice, weight = self._choice(x.dtype)
        z = jnp.einsum("bti,bri->btr", thin, first[choice].astype(x.dtype), precision=rule.precision)
        y = jnp.einsum("btr,bro->bto", z * weight, second[choice].astype(x.dtype), precision=rule.precision)
        kept = self.layout.positions(left)
        y = ungroup(y).reshape(*sizes, *(self.shape[p] for p in kept))
        y = lax.transpose(y, (*range(n_free), *(n_free + kept.index(p) for p in sorted(kept))))
        whole = contract(x, self.base, rule)
        return whole + y.reshape(whole.shape).astype(whole.dtype)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows plus each batch row's own `first[:, id]ᵀ·second`."""
        side = side_of(self.layout, (rule.axis,))
        first, second, left = (self.a, self.b, "o") if side == "i" else (self.b, self.a, "i")
        found = contract(indices, self.base, rule)
        ids, ungroup = self._grouped(indices)  # [B, tokens of the row, 1]
        ids = ids[..., 0]
        choice, weight = self._choice(found.dtype)
        thin = first[choice[:, None], :, ids]  # [B, tokens, r]
        y = jnp.einsum("btr,bro->bto", thin * weight, second[choice])
        kept = self.layout.positions(left)
        lead = indices.ndim - 1
        y = ungroup(y).reshape(*indices.shape[:-1], *(self.shape[p] for p in kept))
        y = lax.transpose(y, (*range(lead), *(lead + kept.index(p) for p in sorted(kept))))
        return found + y.reshape(found.shape).astype(found.dtype)

    def part_specs(self, spec: PartitionSpec) -> "BatchedLowRank | None":
        """As other weights', the rows divided as the batch is."""
        specs = super().part_specs(spec)
        stack = () if specs is None else tuple(specs.rows)[: len(self.layout.stack)]
        return None if specs is None else replace(specs, rows=PartitionSpec(*stack, self.over))

    def divided_with(self, activations: Sequence[tuple[Sequence[int], PartitionSpec]]) -> Self:
        """The weight with its rows divided as `shard_map` divides the batch of these shapes.

        Raises:
            PeftError: it cannot be told whether, or over what, the batch is divided.
        """
        batch = self.rows.shape[-1]
        exact, flattened = set(), set()  # over what an axis of B members is divided, or one of a multiple
        unclear = None
        for shape, spec in activations:
            divided = (*spec, *(None,) * (len(shape) - len(spec)))
            at = [n for n, size in enumerate(shape) if size == batch]
            if self.axis is not None:
                at = [self.axis] if self.axis in at else []
            if len(at) > 1 and any(divided[n] is not None for n in at):
                unclear = shape, spec
            elif at:
                exact.add(divided[at[0]])
            elif shape and shape[0] % batch == 0 and divided[0] is not None and self.axis != 1:
                flattened.add(divided[0])  # the batch outermost; innermost, every part has all of it
                unclear = unclear or ((shape, spec) if self.axis is None else None)
        if unclear and not exact:
            raise PeftError(
                f"{self.layout.name}: adapters are mixed over a batch of {batch} rows, and shard_map divides "
                f"an activation {tuple(unclear[0])} as {unclear[1]}, in which the batch is not to be told "
                "from the other axes; say which one it is: mix(adapters, rows, axis=0), or axis=1 with the "
                "sequence first"
            )
        over = exact or flattened
        if len(over) > 1:
            raise PeftError(
                f"{self.layout.name}: adapters are mixed over a batch of {batch} rows, and shard_map divides "
                f"axes of that size in several ways, {sorted(map(str, over))}; call peftjax.mix and "
                "peftjax.adapt inside of it, with its own rows"
            )
        return replace(super().divided_with(activations), over=next(iter(over), None))

    def _grouped(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """`[*free, n]` as `[B, tokens, n]`, and how such a result gets the free axes back, flattened."""
        batch, free = self.rows.shape[-1], x.shape[:-1]
        found = [n for n, size in enumerate(free) if size == batch]
        if self.axis is not None and self.axis < len(free) and free[self.axis] == batch:
            at = self.axis
        elif self.axis is None and len(found) == 1:
            at = found[0]
        elif self.axis in (0, 1) and free[0] % batch == 0 and (self.axis == 0 or len(free) == 1):
            tokens = free[0] // batch
            free = ((batch, tokens) if self.axis == 0 else (tokens, batch)) + free[1:]
            at = self.axis
        else:
            raise PeftError(
                f"{self.layout.name}: adapters are mixed over a batch of {batch} rows, but this layer "
                f"sees an activation {x.shape}, in which the batch is "
                f"{'not to be told from the other axes' if self.axis is None else f'not axis {self.axis}'}; "
                "say which axis it is: mix(adapters, rows, axis=0), or axis=1 with the sequence first"
            )
        moved = jnp.moveaxis(x.reshape(*free, x.shape[-1]), at, 0)

        def ungroup(y: Array) -> Array:
            return jnp.moveaxis(y.reshape(*moved.shape[:-1], y.shape[-1]), 0, at)

        return moved.reshape(batch, -1, x.shape[-1]), ungroup

    def _choice(self, dtype: Any) -> tuple[Array, Array]:
        weight = (self.rows >= 0).astype(dtype)[:, None, None]
        return jnp.maximum(self.rows, 0), weight
