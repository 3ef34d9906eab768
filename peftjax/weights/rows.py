"""A weight of which some rows of its input side are exchanged for trained ones."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.derivatives import with_backward
from peftjax.weights.base import Weight, cast, contract, dense
from peftjax.weights.canonical import outputs_in_result, side_of
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import canonical, logical, static, structured
from peftjax.weights.in_place import with_gradient_at, with_gradient_through
from peftjax.weights.indexing import numbered_backwards, numbered_in, put_rows, take_rows
from peftjax.weights.layout import Layout
from peftjax.weights.low_rank import LowRank, widened
from peftjax.weights.sharding import keeping, like
from peftjax.weights.views import reshape, transpose


@structured
class TrainedRows(Weight):
    """`w = base` with rows `rows [*stack, r]` exchanged for `scale · values [*stack, r, out]`.

    A product over the inputs is `x·base + x[rows]·(scale · values - base[rows])`: the backward pass
    keeps `x[rows]`, r numbers a token, and neither x nor an assembled weight; the gradient of the
    values is summed in float32. A lookup keeps nothing more, a tied output layer its input. Every other
    product is that of the equal low-rank weight, whose first factor picks the rows.

    With `in_place` the base holds the trained rows already: forward is the base's own product, and only
    the backward pass knows of the values.
    """

    base: Any = logical()
    values: Array = canonical("o")
    rows: Array = canonical()
    layout: Layout = static()
    scale: float = static(default=1.0)
    in_place: bool = static(default=False)

    def dense(self) -> Array:
        """The base with the rows in place."""
        if self.in_place:
            taken = partial(take_rows, layout=self.layout)
            return with_gradient_at(taken, self.scale, self.base, self.values, (self.rows,))
        return put_rows(dense(self.base), self.rows, self.scale * self.values, self.layout)

    def supports(self, rule: Contraction) -> bool:
        """What the equal low-rank weight supports."""
        return self._low_rank(None, None).supports(rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """The base's product, the results of the exchanged rows corrected."""
        side = side_of(self.layout, rule.w_contract)
        if side == "i":
            y, z = contract(x, self.base, rule), self._chosen(x, rule)
            into = partial(widened, rule=rule, layout=self.layout, side="i", dot=_thin_dot)
            if self.in_place:
                return with_gradient_through(partial(_scaled, into, self.scale), y, z, self.values)
            return y + like(self._correction(into, z).astype(y.dtype), y)
        if self._exchanges:
            y = contract(x, self.base, rule)
            values = self.scale * (self.values if self.layout.letters == "io" else self.values.T)
            exchanged = rule(x, values.astype(x.dtype)).astype(y.dtype)
            (axis,) = outputs_in_result(rule, self.layout, y.ndim)
            return y.at[(slice(None),) * axis + (self.rows,)].set(exchanged, mode="drop")
        return contract(x, self.as_low_rank(), rule)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """The base's rows, the trained ones in place."""
        if side_of(self.layout, (rule.axis,)) != "i" or not self._exchanges:
            return contract(indices, self.as_low_rank(), rule)
        found = contract(indices, self.base, rule)
        hits = indices == self.rows  # [*batch, r]: the last axis of indices has size 1
        hit = jnp.any(hits, axis=-1)
        # A place past the end reads zeros: the sum keeps these numbers alone, a choice would keep masks.
        place = jnp.where(hit, jnp.argmax(hits, axis=-1), self.rows.shape[-1])
        values = (self.scale * self.values).astype(found.dtype)
        trained = values.at[place].get(mode="fill", fill_value=0)
        return jnp.where(hit[..., None], jnp.zeros((), found.dtype), found) + trained

    def conv(self, x: Array, rule: Conv) -> Array:
        """The convolution of the equal low-rank weight."""
        return contract(x, self.as_low_rank(), rule)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The ragged product of the equal low-rank weight."""
        return contract(x, self.as_low_rank(), rule)

    def cast(self, dtype: Any) -> "TrainedRows":
        """The base in another dtype; the values stay as exact as they are."""
        return replace(self, base=cast(self.base, dtype))

    def slice_features(self, position: int, cut: range) -> "TrainedRows | None":
        """A slice of outputs, or one of inputs with the rows that lie in it."""
        view = super().slice_features(position, cut)
        if view is None or self.layout.axes[position].kind == "o":
            return view
        return replace(view, rows=numbered_in(self.rows, cut))

    def reverse(self, position: int) -> "TrainedRows | None":
        """The rows follow a reversed axis of the inputs."""
        view = super().reverse(position)
        if view is None or self.layout.axes[position].kind != "i":
            return view
        return replace(view, rows=numbered_backwards(self.rows, self.layout, position))

    def as_stack(self, position: int) -> "TrainedRows | None":
        """A stack of outputs; the rows are numbered over all inputs."""
        return super().as_stack(position) if self.layout.axes[position].kind == "o" else None

    def part_specs(self, spec: Any) -> "TrainedRows | None":
        """None where inputs are sharded: the rows are numbered over all of them."""
        return None if self.divides(spec, ("i",)) else super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "TrainedRows | None":
        """None for inputs: the rows are numbered over all of them."""
        outputs = self.layout.axes[position].kind == "o"
        return super().gather_features(position, mesh_axes, fn, size) if outputs else None

    @property
    def _exchanges(self) -> bool:
        """Whether rows can be exchanged in results too: in a plain matrix whose base has the old ones."""
        return sorted(self.layout.letters) == ["i", "o"] and not self.in_place

    def _chosen(self, x: Array, rule: Dot) -> Array:
        """The inputs at the trained rows alone: `[batch, free axes of x, stack axes that x has not, r]`."""
        stack, inputs = self.layout.positions("s"), self.layout.positions("i")
        free = tuple(n for n in range(x.ndim) if n not in (*rule.x_contract, *rule.x_batch))
        order = [rule.x_contract[rule.w_contract.index(p)] for p in inputs]
        lead = (*rule.x_batch, *free)
        flat = lax.transpose(x, (*lead, *order)).reshape(*(x.shape[n] for n in lead), -1)
        own = [p for p in stack if p not in rule.w_batch]
        rows = lax.transpose(self.rows, [stack.index(p) for p in (*rule.w_batch, *own)] + [len(stack)])
        kept = keeping(x, lead, len(own) + 1)

        def take(flat: Array, rows: Array) -> Array:
            return flat.at[..., rows].get(mode="fill", fill_value=0, out_sharding=kept)

        for _ in rule.w_batch:
            take = jax.vmap(take)
        return take(flat, rows)

    def _correction(self, into: Any, z: Array) -> Array:
        """`z·(scale · values - base[rows])`; the difference is recomputed in the backward pass."""

        @jax.checkpoint
        def correction(z: Array, values: Array, base: Any, rows: Array) -> Array:
            old = rows_of(base, self.layout, rows)
            return into(z, like(_rounded(self.scale * values, base.dtype), old) - old)

        return correction(z, self.values, self.base, self.rows)

    def as_low_rank(self) -> LowRank:
        """The same weight with factors: `a` picks the rows, `b` is what they change by."""
        new = _rounded(self.scale * self.values, self.dtype)
        old = lax.stop_gradient(new) if self.in_place else rows_of(self.base, self.layout, self.rows)
        picked = jax.nn.one_hot(self.rows, self.layout.matrix[0], dtype=self.dtype)
        return self._low_rank(picked, new - old)

    def _low_rank(self, a: Any, b: Any) -> LowRank:
        return LowRank(self.base, a, b, self.layout)


def rows_of(w: Any, layout: Layout, rows: Array) -> Array:
    """Rows `[*stack, r]` of an array or structured weight, float32 `[*stack, r, out]`, zeros past the end."""
    if not isinstance(w, Weight):
        return take_rows(w, rows, layout).astype(jnp.float32)
    w = reshape(transpose(w, layout.canonical_order), (*layout.stack, *layout.matrix))
    assert w is not None

    def of_matrix(w: Weight, rows: Array) -> Array:
        w = w.relabeled(lambda at: replace(at, axes=tuple(a for a in at.axes if a.kind != "s")))
        outside = (("mode", lax.GatherScatterMode.FILL_OR_DROP), ("fill_value", 0))
        return contract(rows[:, None], w, Gather(0, outside))

    for _ in layout.stack:
        of_matrix = jax.vmap(of_matrix)
    return of_matrix(w, rows).astype(jnp.float32)


def _rounded(values: Array, dtype: Any) -> Array:
    """Float32 values as the weight's dtype holds them; their gradient is not rounded."""
    info = jnp.finfo(dtype)
    return values + lax.stop_gradient(lax.reduce_precision(values, info.nexp, info.nmant) - values)


def _scaled(into: Any, scale: float, z: Array, values: Array) -> Array:
    return into(z, scale * values)


def _thin_dot(
    z: Array, second: Array, dimension_numbers: Any, precision: Any, preferred_element_type: Any
) -> Array:
    """`lax.dot_general(z, second, ...)` in z's dtype, contracting z's last axis.

    Backward keeps both; the gradient of `second` is summed in float32 and has its dtype.
    """
    options = (dimension_numbers, precision, preferred_element_type)

    def forward(z: Array, second: Array) -> tuple[Array, tuple[Array, Array]]:
        return _thin_dot(z, second, *options), (z, second)

    return with_backward(partial(_thin_product, *options), forward, partial(_thin_backward, *options))(
        z, second
    )


def _thin_product(dims: Any, precision: Any, preferred: Any, z: Array, second: Array) -> Array:
    return lax.dot_general(
        z, second.astype(z.dtype), dims, precision=precision, preferred_element_type=preferred
    )


def _thin_backward(
    dims: Any, precision: Any, preferred: Any, residuals: Any, g: Array
) -> tuple[Array, Array]:
    z, second = residuals
    _, pull = jax.vjp(lambda z: _thin_product(dims, precision, preferred, z, second), z)
    (_, (rank,)), (of_z, of_second) = dims
    free = tuple(n for n in range(z.ndim - 1) if n not in of_z)
    n_batch = len(of_z)
    summed = lax.dot_general(
        z,
        g.astype(z.dtype),
        ((free, tuple(n_batch + n for n in range(len(free)))), (of_z, tuple(range(n_batch)))),
        precision=precision,
        preferred_element_type=jnp.promote_types(second.dtype, jnp.float32),
        out_sharding=keeping(second, (*of_second, *range(rank, second.ndim))),
    )
    return pull(g)[0], jnp.moveaxis(summed, range(n_batch), of_second).astype(second.dtype)
