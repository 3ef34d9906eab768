"""Moving arrays between a weight's logical axes and its canonical form `[*stack, in, out]`."""

from jax import Array, lax

from peftjax.weights.contraction import Dot
from peftjax.weights.layout import Layout, Side


def side_of(layout: Layout, positions: tuple[int, ...]) -> Side | None:
    """'i' when the positions are all input axes, 'o' when they are all output axes, else None."""
    for side in ("i", "o"):
        if set(positions) == set(layout.positions(side)):
            return side
    return None


def to_logical(w: Array, layout: Layout) -> Array:
    """`[*stack, in, out]` in the logical shape."""
    order = layout.canonical_order
    split = lax.reshape(w, tuple(layout.shape[position] for position in order))
    return lax.transpose(split, tuple(order.index(position) for position in range(len(order))))


def to_canonical(w: Array, layout: Layout) -> Array:
    """The logical array as `[*stack, in, out]`."""
    return lax.reshape(lax.transpose(w, layout.canonical_order), (*layout.stack, *layout.matrix))


def side_to_logical(v: Array, layout: Layout, side: Side) -> Array:
    """`[*stack, n]`, one number per input or output, broadcastable against the logical weight."""
    order = layout.canonical_order
    kept = ("s", side)
    sizes = [a.size if (a := layout.axes[p]).kind in kept else 1 for p in order]
    return lax.transpose(
        lax.reshape(v, tuple(sizes)), tuple(order.index(position) for position in range(len(order)))
    )


def result_of_dot(y: Array, rule: Dot, layout: Layout, side: Side) -> Array:
    """A product with canonical factors with its axes in the order of the `dot_general`'s result.

    y: `[batch, stack axes that x has not, free axes of x, output axes in canonical order]`, outputs
    being the axes of the side that x did not meet.
    """
    outputs = layout.positions("o" if side == "i" else "i")
    stack = tuple(p for p in layout.positions("s") if p not in rule.w_batch)
    n_batch = len(rule.w_batch)
    n_free = y.ndim - n_batch - len(stack) - len(outputs)
    free = tuple(n_batch + len(stack) + n for n in range(n_free))
    at = {p: n_batch + n for n, p in enumerate(stack)}
    at |= {p: n_batch + len(stack) + n_free + n for n, p in enumerate(outputs)}
    of_weight = tuple(at[p] for p in sorted(at))
    both = (of_weight, free) if rule.weight_first else (free, of_weight)
    y = lax.transpose(y, (*range(n_batch), *both[0], *both[1]))
    units = [p for p in layout.positions("1") if p not in rule.w_contract]
    if not units:
        return y
    first = n_batch if rule.weight_first else n_batch + n_free
    shape = list(y.shape)
    left = sorted([*at, *units])
    shape[first : first + len(of_weight)] = [layout.shape[p] for p in left]
    return lax.reshape(y, tuple(shape))


def outputs_in_result(rule: Dot, layout: Layout, result_ndim: int) -> tuple[int, ...]:
    """Where the axes of the weight that stay free stand in a `dot_general`'s result."""
    used = {*rule.w_contract, *rule.w_batch}
    n_left = sum(p not in used for p in range(len(layout.axes)))
    first = len(rule.w_batch) if rule.weight_first else result_ndim - n_left
    return tuple(range(first, first + n_left))


def along_result(v: Array, rule: Dot, layout: Layout, result_ndim: int) -> Array:
    """Numbers of the side that x did not meet, from `side_to_logical`, broadcastable against the product."""
    used = {*rule.w_contract, *rule.w_batch}
    left = [p for p in range(len(layout.axes)) if p not in used]
    shape = [1] * result_ndim
    for axis, p in zip(outputs_in_result(rule, layout, result_ndim), left):
        shape[axis] = v.shape[p]
    for axis, p in enumerate(rule.w_batch):
        shape[axis] = v.shape[p]
    return lax.transpose(v, (*rule.w_batch, *left, *rule.w_contract)).reshape(shape)


def along(numbers: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """Numbers that vary along the given axes of an array, in this order, broadcastable against it."""
    numbers = lax.transpose(numbers, sorted(range(len(axes)), key=axes.__getitem__))
    return lax.expand_dims(numbers, [n for n in range(ndim) if n not in axes])
