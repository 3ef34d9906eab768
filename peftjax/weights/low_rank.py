"""`W + scale · aᵀb`, contracted in activation space: the dense sum is never formed in a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.weights.base import Weight, contract, dense
from peftjax.weights.canonical import result_of_dot, side_of, to_logical
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.dropout import drop, key_for_input
from peftjax.weights.fields import canonical, logical, random_key, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.quantized import Quantized
from peftjax.weights.sharding import is_explicit, keeping, like

Product = Callable[[Array, Array], Array]
Enter = Callable[[Product, Array, Array], Array]
"""`(product, x, first factor) -> product(x, first factor)`, with what is done to x on the way."""


@structured
class LowRank(Weight):
    """`w = base + scale · aᵀ b` with `a [*stack, r, in]` and `b [*stack, r, out]`.

    A product with x is `x·base + scale · (x·aᵀ)·b`: the factors are stored rank first so that both
    gradients contract the thin side. The backward pass keeps x, which the base's layer shares with its
    neighbors, and the thin `x·aᵀ`. With `dropout` and a `key`, x is masked on the adapter's path only
    and the mask is recomputed from the key in the backward pass.
    """

    base: Any = logical()
    a: Array = canonical("i")
    b: Array = canonical("o")
    layout: Layout = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    key: Array | None = random_key(default=None)

    def dense(self) -> Array:
        """`base + scale · aᵀ b`, in the base's dtype."""
        delta = self.scale * jnp.einsum("...ri,...ro->...io", self.a, self.b)
        return dense(self.base) + to_logical(delta, self.layout).astype(self.dtype)

    def supports(self, rule: Contraction) -> bool:
        """Contractions over all inputs or all outputs, and whatever else the base supports."""
        if isinstance(self.base, Weight) and not self.base.supports(rule):
            return False
        return low_rank_supports(self.layout, rule)

    def dot(self, x: Array, rule: Dot) -> Array:
        """`x·base + scale · (x·first)·second`, first being the factor of the side that x meets."""
        side = met_side(self.layout, rule)

        first, second = self._sides(side)
        if isinstance(self.base, Quantized) and self.base.multiplies(x, rule):
            z, second, _, _ = _narrowed(x, first, second, self.scale, rule, self.layout, side, self._enter)
            return self.base.multiplied(x, rule, z, second)

        def delta(x: Array, first: Array, second: Array) -> Array:
            return low_rank_dot(x, first, second, self.scale, rule, self.layout, side, self._enter)

        return self._add(contract(x, self.base, rule), delta, x, side)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """Rows of the base plus `scale · aᵀ[rows]·b`."""
        side = side_of(self.layout, (rule.axis,))
        assert side is not None
        rows = contract(indices, self.base, rule)
        delta = low_rank_gather(indices, *self._sides(side), self.scale, rule, self.layout, side)
        return rows + delta.astype(rows.dtype)

    def conv(self, x: Array, rule: Conv) -> Array:
        """The base's convolution plus one of the same geometry to r channels and a 1x1 one to all.

        Where x meets the outputs, as in the gradient of a convolution, the 1x1 one comes first. With
        groups, each group meets the same `a` and its own part of `b`, which is exactly
        `base + scale · aᵀb` seen as a grouped kernel.
        """

        def delta(x: Array, a: Array, b: Array) -> Array:
            return low_rank_conv(x, a, b, self.scale, rule, self.layout, self._enter)

        return self._add(contract(x, self.base, rule), delta, x, "i")

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The base's ragged product plus `scale` times two with r numbers between them."""
        side = side_of(self.layout, rule.w_contract)
        assert side is not None

        def delta(x: Array, first: Array, second: Array) -> Array:
            a, b = (first, second) if side == "i" else (second, first)
            return low_rank_ragged_dot(x, a, b, self.scale, rule, self.layout, self._enter)

        return self._add(contract(x, self.base, rule), delta, x, side)

    def _sides(self, side: Side) -> tuple[Array, Array]:
        return (self.a, self.b) if side == "i" else (self.b, self.a)

    def _add(self, y: Array, delta: Callable[[Array, Array, Array], Array], x: Array, side: Side) -> Array:
        return y + like(delta(x, *self._sides(side)).astype(y.dtype), y)

    def _enter(self, product: Product, x: Array, first: Array) -> Array:
        """`x·first` with x dropped out; backward recomputes the mask, and keeps x only to train `first`."""
        if self.key is None or self.dropout == 0.0:
            return product(x, first)

        @jax.checkpoint
        def of_dropped(x: Array, first: Array, key: Array) -> Array:
            return product(drop(x, self.dropout, key), first)

        return of_dropped(x, first, key_for_input(self.key, x))


def low_rank_supports(layout: Layout, rule: Contraction) -> bool:
    """Whether factors in this layout can take the rule without forming their product."""
    if isinstance(rule, Dot):
        stack = set(layout.positions("s"))
        met = tuple(p for p in rule.w_contract if p not in stack)
        return side_of(layout, met) is not None and set(rule.w_batch) <= stack
    if isinstance(rule, Gather):
        return side_of(layout, (rule.axis,)) is not None and not layout.stack
    if isinstance(rule, Conv):
        return conv_order(layout, rule) is not None and not layout.stack
    stacked = {rule.w_group, *rule.w_batch} == set(layout.positions("s")) and "1" not in layout.letters
    return stacked and side_of(layout, rule.w_contract) is not None


def met_side(layout: Layout, rule: Dot) -> Side:
    """The side that an activation meets in a product that `low_rank_supports`."""
    side = side_of(layout, tuple(p for p in rule.w_contract if layout.axes[p].kind != "s"))
    assert side is not None
    return side


def _plainly(product: Product, x: Array, first: Array) -> Array:
    return product(x, first)


def low_rank_dot(
    x: Array,
    first: Array,
    second: Array,
    scale: float,
    rule: Dot,
    layout: Layout,
    side: Side,
    enter: Enter = _plainly,
) -> Array:
    """`scale · (x·first)·second`; every product contracts or yields the rank axis."""
    return widened(*_narrowed(x, first, second, scale, rule, layout, side, enter), side)


def _narrowed(
    x: Array,
    first: Array,
    second: Array,
    scale: float,
    rule: Dot,
    layout: Layout,
    side: Side,
    enter: Enter,
) -> tuple[Array, Array, Dot, Layout]:
    """`scale · x·first`, and what is left to be done with it: second, the rule and the layout.

    A stack axis that is summed over is one that x has in the first product, and part of the rank in the
    second.
    """
    summed = [(n, p) for n, p in zip(rule.x_contract, rule.w_contract) if layout.axes[p].kind == "s"]
    if summed:
        of_x, of_w = zip(*summed)
        rule = replace(
            rule,
            x_contract=tuple(n for n in rule.x_contract if n not in of_x),
            w_contract=tuple(p for p in rule.w_contract if p not in of_w),
            x_batch=(*rule.x_batch, *of_x),
            w_batch=(*rule.w_batch, *of_w),
        )
    stack, entered = layout.positions("s"), layout.positions(side)
    first = first.reshape(*layout.stack, -1, *(layout.shape[p] for p in entered)).astype(x.dtype)
    rank = len(stack)
    at = {p: n for n, p in enumerate(stack)} | {p: rank + 1 + n for n, p in enumerate(entered)}
    contracted = (rule.x_contract, tuple(at[p] for p in rule.w_contract))
    batched = (rule.x_batch, tuple(at[p] for p in rule.w_batch))
    precise = {"precision": rule.precision, "preferred_element_type": rule.preferred}
    free_stack = tuple(p for p in stack if p not in rule.w_batch)
    free = [n for n in range(x.ndim) if n not in (*rule.x_contract, *rule.x_batch)]
    kept = keeping(x, (*rule.x_batch, *free), len(free_stack) + 1)

    def product(x: Array, first: Array) -> Array:
        return lax.dot_general(x, first, (contracted, batched), **precise, out_sharding=kept)

    z = (scale * enter(product, x, first)).astype(x.dtype)
    second = second.astype(x.dtype)
    if summed:
        return _into_rank(z, second, rule, layout, len(summed))
    return z, second, rule, layout


def _into_rank(
    z: Array, second: Array, rule: Dot, layout: Layout, count: int
) -> tuple[Array, Array, Dot, Layout]:
    """The last `count` batch axes of the rule as part of the rank: it is summed with them."""
    n, stack = len(rule.w_batch) - count, layout.positions("s")
    gone = rule.w_batch[n:]
    z = jnp.moveaxis(z, range(n, n + count), range(z.ndim - 1 - count, z.ndim - 1))
    z = z.reshape(*z.shape[: z.ndim - 1 - count], -1)
    last = len(stack)  # where the rank is
    second = jnp.moveaxis(second, [stack.index(p) for p in gone], range(last - count, last))
    second = second.reshape(*second.shape[: last - count], -1, second.shape[-1])
    for position in sorted(gone, reverse=True):
        layout = layout.drop(position)

    def left(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(p - sum(q < p for q in gone) for p in axes)

    rule = replace(
        rule, x_batch=rule.x_batch[:n], w_batch=left(rule.w_batch[:n]), w_contract=left(rule.w_contract)
    )
    return z, second, rule, layout


def widened(
    z: Array,
    second: Array,
    rule: Dot,
    layout: Layout,
    side: Side,
    dot: Callable[..., Array] = lax.dot_general,
) -> Array:
    """`z·second` as the result of the rule on a whole weight.

    Args:
        z: x reduced to r numbers, `[batch, free axes of x, stack axes that x has not, r]`.
        second: `[*stack, r, n]`, n over the side that x did not meet.
        rule: of the whole product.
        layout: of the whole weight.
        side: the one that x met.
        dot: `lax.dot_general`, or one with a gradient rule of its own.
    """
    stack, n_batch = layout.positions("s"), len(rule.w_batch)
    left = layout.positions("o" if side == "i" else "i")
    second = second.reshape(*layout.stack, -1, *(layout.shape[p] for p in left))
    free_stack = tuple(p for p in stack if p not in rule.w_batch)
    # The free axes become one: the gradient of `second` is a product over them, and a product over
    # several axes makes the compiler rearrange its first operand, the wide cotangent (measured on a
    # CPU: half of the time of a LoRA step). Where shardings are part of the type, axes with different
    # shardings cannot become one.
    sizes = z.shape[n_batch : z.ndim - 1 - len(free_stack)]
    one = not is_explicit(z)
    if one:
        z = z.reshape(*z.shape[:n_batch], -1, *z.shape[n_batch + len(sizes) :])
    batch = (*range(n_batch), *range(z.ndim - 1 - len(free_stack), z.ndim - 1))
    of_second = tuple(stack.index(p) for p in (*rule.w_batch, *free_stack))
    y = dot(
        z,
        second,
        (((z.ndim - 1,), (len(stack),)), (batch, of_second)),
        precision=rule.precision,
        preferred_element_type=rule.preferred,
    )
    if one:
        lead = n_batch + len(free_stack)
        y = y.reshape(*y.shape[:lead], *sizes, *y.shape[lead + 1 :])
    return result_of_dot(y, rule, layout, side)


def low_rank_gather(
    indices: Array, first: Array, second: Array, scale: float, rule: Gather, layout: Layout, side: Side
) -> Array:
    """`scale · firstᵀ[indices]·second`, the axes of a row in their logical order."""
    left = layout.positions("o" if side == "i" else "i")
    thin = Gather(axis=0, options=rule.options)(indices, first.T)
    batch = thin.ndim - 1
    wide = scale * (thin @ second)
    wide = wide.reshape(*thin.shape[:-1], *(layout.shape[p] for p in left))
    wide = lax.transpose(wide, (*range(batch), *(batch + left.index(p) for p in sorted(left))))
    row = tuple(size for position, size in enumerate(layout.shape) if position != rule.axis)
    return wide.reshape(*thin.shape[:-1], *row)


def low_rank_ragged_dot(
    x: Array, a: Array, b: Array, scale: float, rule: RaggedDot, layout: Layout, enter: Enter = _plainly
) -> Array:
    """`scale` times two ragged products with r numbers between them."""
    side = side_of(layout, rule.w_contract)
    assert side is not None
    (x_contract, _), (x_batch, w_batch) = rule.numbers.dot_dimension_numbers
    (ragged,) = rule.numbers.lhs_ragged_dimensions
    stack, met = layout.positions("s"), layout.positions(side)
    left = layout.positions("o" if side == "i" else "i")
    first, second = (a, b) if side == "i" else (b, a)
    group, batch = stack.index(rule.w_group), tuple(stack.index(p) for p in w_batch)

    def numbers(
        of_x: Sequence[int], of_w: Sequence[int], in_x: Sequence[int], ragged: int
    ) -> lax.RaggedDotDimensionNumbers:
        return lax.RaggedDotDimensionNumbers(((of_x, of_w), (in_x, batch)), (ragged,), (group,))

    n = len(stack)
    first = jnp.moveaxis(first, n, -1).reshape(*layout.stack, *layout.sizes(side), -1).astype(x.dtype)
    enters = replace(
        rule, numbers=numbers(x_contract, tuple(n + met.index(p) for p in rule.w_contract), x_batch, ragged)
    )
    z = enter(enters, x, first)  # [batch, free axes of x, r]
    free = [p for p in range(x.ndim) if p not in (*x_contract, *x_batch)]
    second = second.reshape(*layout.stack, -1, *(layout.shape[p] for p in left)).astype(x.dtype)
    row = len(batch) + free.index(ragged)
    leaves = replace(rule, numbers=numbers((z.ndim - 1,), (n,), tuple(range(len(batch))), row))
    y, lead = leaves((scale * z).astype(x.dtype), second), z.ndim - 1
    return lax.transpose(y, (*range(lead), *(lead + left.index(p) for p in sorted(left))))


def low_rank_conv(
    x: Array, a: Array, b: Array, scale: float, rule: Conv, layout: Layout, enter: Enter = _plainly
) -> Array:
    """`scale` times two convolutions with r channels between them, one of the rule's geometry, one 1x1."""
    order = conv_order(layout, rule)
    assert order is not None
    side, window_first = order
    numbers, groups, options = rule.dimension_numbers, rule.feature_group_count, dict(rule.options)
    out_axis, in_axis, *window = numbers.rhs_spec
    met, left = (a, b) if side == "i" else (b, a)
    first = _as_kernel(met, layout, side, out_axis).astype(x.dtype)
    first = jnp.concatenate([first] * groups, axis=out_axis)  # groups · r channels
    second = _as_kernel(left, layout, "o" if side == "i" else "i", in_axis).astype(x.dtype)
    at_ease = numbers.out_spec if window_first else numbers.lhs_spec
    pointwise = Conv(
        numbers._replace(lhs_spec=at_ease, out_spec=at_ease),
        (
            ("window_strides", (1,) * len(window)),
            ("padding", ((0, 0),) * len(window)),
            ("precision", options.get("precision")),
            ("preferred_element_type", options.get("preferred_element_type")),
        ),
        groups,
    )
    enters, leaves = (rule, pointwise) if window_first else (pointwise, rule)
    return leaves((scale * enter(enters, x, first)).astype(x.dtype), second)


def conv_order(layout: Layout, rule: Conv) -> tuple[Side, bool] | None:
    """The side whose factor a convolved activation meets first, and whether the window, an input, is there.

    None where the outputs are not one feature axis of the kernel.
    """
    out_axis, in_axis = rule.dimension_numbers.rhs_spec[:2]
    if layout.positions("o") == (out_axis,):
        return "i", True
    return ("o", False) if layout.positions("o") == (in_axis,) else None


def _as_kernel(factor: Array, layout: Layout, side: Side, rank_axis: int) -> Array:
    """A factor `[r, n]` as the kernel of a convolution, its rank along a feature axis that it has not."""
    axes = (rank_axis, *layout.positions(side))
    kernel = factor.reshape(-1, *layout.sizes(side))
    kernel = lax.transpose(kernel, sorted(range(len(axes)), key=axes.__getitem__))
    return lax.expand_dims(kernel, [p for p in range(len(layout.axes)) if p not in axes])
