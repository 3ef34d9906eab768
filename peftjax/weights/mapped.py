"""A weight with a linear map of activations before it, after it or beside it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import compat
from peftjax.weights.base import Weight, cast, contract, dense, lazily_merged
from peftjax.weights.canonical import outputs_in_result, side_of, to_canonical, to_logical
from peftjax.weights.contraction import Contraction, Dot, Gather, RaggedDot
from peftjax.weights.dropout import drop, key_for_input
from peftjax.weights.fields import Slots, logical, random_key, shared, stacked, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.sharding import keeping, like, undivided, whole
from peftjax.weights.stack_members import over_stack
from peftjax.weights.views import WholeMatrices

Map = Callable[[Slots, Array], Array]
"""`(slots of one matrix, x [..., in]) -> [..., out]`, linear in x and of its dtype; static, so hashable.

The slots that all matrices share are among them.
"""
Place = Literal["before", "after", "beside"]


@structured
class Mapped(WholeMatrices, Weight):
    """`w = M·base` (before), `base·M` (after) or `base + M` (beside), M a map of activations.

    A product with x is `(x·M)·base`, `(x·base)·M` or `x·base + x·M`; where x meets the outputs, M's transpose
    acts in the other place. The backward pass keeps what the map is given, and recomputes what is in it. What
    is no such product merges the weight in its layer.

    Attributes:
        base: the array or weight beside it.
        slots: the map's numbers, arrays `[*stack, ...]`.
        layout: of the logical axes.
        map: the map of one matrix.
        place: where it acts.
        dropout: on what a map beside the base is given.
        key: for the dropout.
        shared: numbers of the map that all matrices use.
    """

    base: Any = logical()
    slots: Slots = stacked()
    layout: Layout = static()
    map: Map = static()
    place: Place = static()
    dropout: float = static(default=0.0)
    key: Array | None = random_key(default=None)
    shared: Slots | None = shared(default=None)

    def dense(self) -> Array:
        """The array, formed in float32 or wider, in the base's dtype."""
        base = dense(self.base)
        w = to_canonical(whole(base), self.layout)
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        if self.place == "before":
            new = self._through("o", w.swapaxes(-1, -2)).swapaxes(-1, -2)
        elif self.place == "after":
            new = self._through("i", w)
        else:
            n = self.layout.matrix[0]
            unit = jnp.broadcast_to(jnp.eye(n, dtype=w.dtype), (*self.layout.stack, n, n))
            new = w + self._through("i", unit)
        return like(to_logical(new, self.layout).astype(self.dtype), base)

    def supports(self, rule: Contraction) -> bool:
        """What the base supports, but for sums over a stack, whose matrices have maps of their own."""
        if isinstance(rule, RaggedDot) and not rule.of_rows:
            return False
        if isinstance(rule, Dot) and side_of(self.layout, rule.w_contract) is None:
            return False
        return not isinstance(self.base, Weight) or self.base.supports(rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The map and the base's product, one after the other or side by side."""
        side = side_of(self.layout, rule.w_contract)
        if side is None or set(self.layout.positions("s")) != set(rule.w_batch) or self.layout.positions("1"):
            return lazily_merged(rule, x, self)
        if self.place == "beside":
            y = contract(x, self.base, rule)
            key = None if self.key is None or self.dropout == 0.0 else key_for_input(self.key, x)
            return y + like(self.beside(x, rule, side, key).astype(y.dtype), y)
        other: Side = "o" if side == "i" else "i"
        axes_of_x, order = self._axes_of_activation(rule, side)
        if (self.place == "before") == (side == "i"):
            return contract(like(self._applied(x, axes_of_x, order, side, axes_of_x), x), self.base, rule)
        y = contract(x, self.base, rule)
        axes_of_y = self._axes_of_result(rule, y.ndim, other)
        return like(self._applied(y, axes_of_y, order, side, axes_of_y), y)

    def beside(self, x: Array, rule: Dot, side: Side, key: Array | None) -> Array:
        """The product of x with what a map adds to the base, with dropout where there is a key."""
        axes, order = self._axes_of_activation(rule, side)
        ndim = x.ndim - len(rule.x_contract) + self.ndim - len(rule.w_contract) - len(rule.w_batch)
        other: Side = "o" if side == "i" else "i"
        return self._applied(x, axes, order, side, self._axes_of_result(rule, ndim, other), key)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows, each mapped, where the map acts on what a row holds."""
        side = side_of(self.layout, (rule.axis,))
        if self.layout.stack or side is None or self.place != ("after" if side == "i" else "before"):
            return lazily_merged(rule, indices, self)
        rows = contract(indices, self.base, rule)
        other: Side = "o" if side == "i" else "i"
        held = [p for p in range(self.ndim) if p != rule.axis]
        first = rows.ndim - len(held)
        axes = tuple(first + held.index(p) for p in self.layout.positions(other))
        return like(self._applied(rows, axes, (), side, axes), rows)

    def cast(self, dtype: Any) -> "Mapped":
        """The base in another dtype; the slots stay as exact as they are."""
        return replace(self, base=cast(self.base, dtype))

    def _applied(
        self,
        x: Array,
        axes: tuple[int, ...],
        order: tuple[int, ...],
        side: Side,
        to: tuple[int, ...],
        key: Array | None = None,
    ) -> Array:
        """The map of x, or its transpose where x met the outputs.

        Args:
            x: the activation.
            axes: of x: the stack's, then those of the features.
            order: the stack axes of the slots in the order in which x has them.
            side: that x met.
            to: of the result: the stack's, then those of its features.
            key: for dropout.
        """
        stack = len(order)

        def applied(x: Array, slots: Slots, of_all: Slots | None, key: Array | None) -> Array:
            x = undivided(x if key is None else drop(x, self.dropout, key), axes[stack:])
            slots, of_all = jax.tree.map(whole, (slots, of_all))
            free = [n for n in range(x.ndim) if n not in axes]
            rows = lax.transpose(x, (*axes[:stack], *free, *axes[stack:]))
            rows = rows.reshape(*rows.shape[: stack + len(free)], -1)
            y = over_stack(self._map(side, of_all), stack)(_ordered(slots, order), rows)
            y = y.reshape(*y.shape[:-1], *self._result_sizes(side))
            left = [n for n in range(y.ndim) if n not in to]
            at = (*to[:stack], *left, *to[stack:])
            return lax.transpose(y, sorted(range(y.ndim), key=at.__getitem__))

        return jax.checkpoint(applied)(x, self.slots, self.shared, key)

    def _result_sizes(self, side: Side) -> tuple[int, ...]:
        """The sizes of the features that the map, or its transpose, gives."""
        if self.place == "beside":
            return self.layout.sizes("o" if side == "i" else "i")
        return self.layout.sizes("i" if self.place == "before" else "o")

    def _axes_of_activation(self, rule: Dot, side: Side) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of x, the stack's and then those of its features, and the stack axes in the order of x."""
        met = dict(zip(rule.w_contract, rule.x_contract))
        axes = (*rule.x_batch, *(met[p] for p in self.layout.positions(side)))
        return axes, tuple(self.layout.axes[p].place for p in rule.w_batch)

    def _axes_of_result(self, rule: Dot, ndim: int, side: Side) -> tuple[int, ...]:
        """Where the stack, in the order of the rule, and the axes of a side stand in a product's result."""
        used = {*rule.w_contract, *rule.w_batch}
        left = [p for p in range(self.ndim) if p not in used]
        at = dict(zip(left, outputs_in_result(rule, self.layout, ndim)))
        return (*range(len(rule.w_batch)), *(at[p] for p in self.layout.positions(side)))

    def _through(self, side: Side, rows: Array) -> Array:
        """The map of each matrix of the stack, or its transpose, on rows `[*stack, ..., n]`."""
        slots, of_all = jax.tree.map(whole, (self.slots, self.shared))
        return over_stack(self._map(side, of_all), len(self.layout.stack))(slots, rows)

    def _map(self, side: Side, of_all: Slots | None) -> Map:
        """The map, or its transpose for activations that meet the outputs."""

        def own(slots: Slots, x: Array) -> Array:
            return self.map({**(of_all or {}), **slots}, x)

        if side == "i":
            return own
        n, m = self.layout.matrix
        entering = {"before": n, "after": m, "beside": n}[self.place]

        def transposed(slots: Slots, g: Array) -> Array:
            place = keeping(g, range(g.ndim - 1), more=1)
            x = jax.ShapeDtypeStruct((*g.shape[:-1], entering), g.dtype, sharding=place)
            # Inside a shard_map, what no device has in common with others has no sum over them.
            slots, g = compat.varying_alike((slots, g))
            x = jax.eval_shape(lambda x, g: compat.varying_alike((x, g))[0], x, g)
            return jax.linear_transpose(lambda x: own(slots, x), x)(g)[0]

        return transposed


def _ordered(slots: Slots, order: tuple[int, ...]) -> Slots:
    """The slots with their stack axes in another order."""
    return jax.tree.map(lambda s: lax.transpose(s, (*order, *range(len(order), s.ndim))), slots)
