"""Equations that scale, shift, mask or measure a weight: the result is a weight, or its lengths."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import compat
from peftjax.interpreter.lookups import as_activation
from peftjax.weights.base import Weight
from peftjax.weights.canonical import side_to_logical
from peftjax.weights.diagonal import Diagonal
from peftjax.weights.elementwise import Masked, Sum
from peftjax.weights.layout import Kind, Layout, Side
from peftjax.weights.low_rank import LowRank
from peftjax.weights.norms import rows_through, squared_norms
from peftjax.weights.scaled import Scaled


def times(eqn: Any, operands: list[Any]) -> Weight | None:
    """`w · x` and `w / x`: numbers for each matrix, input or output scale x or the result of a product."""
    weight, factor = operands if isinstance(operands[0], Weight) else reversed(operands)
    divides = eqn.primitive.name == "div"
    if isinstance(factor, Weight) or (divides and weight is not operands[0]) or not _fits(factor, weight):
        return None
    layout, kinds = weight.layout, _kinds(factor, weight)
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    thin = not {"i", "o"} <= kinds
    factor = jnp.asarray(factor, wide if thin else None)
    factor = 1 / factor if divides else factor
    if not thin:
        return Masked(weight, jnp.broadcast_to(factor, weight.shape), layout)
    if kinds <= {"s"}:
        return Scaled(weight, _canonical(factor, layout, ("s",)), layout)
    if "i" in kinds:
        return Diagonal(weight, layout, by_input=_canonical(factor, layout, ("s", "i")))
    return Diagonal(weight, layout, by_output=_canonical(factor, layout, ("s", "o")))


def negated(eqn: Any, operands: list[Any]) -> Weight:
    """`-w`."""
    return _negative(operands[0])


def plus(eqn: Any, operands: list[Any]) -> Any:
    """`w + x` and `w - x`: a product of rank one where x is the same for all inputs, or for all outputs."""
    # Position embeddings: `table[None, :length] + x`.
    plain = [as_activation(v) if isinstance(v, Weight) else v for v in operands]
    if all(v is not None for v in plain):
        return compat.bind(eqn, plain)
    left, right = operands
    if eqn.primitive.name == "sub":
        right = _negative(right) if isinstance(right, Weight) else -right
    weight, other = (left, right) if isinstance(left, Weight) else (right, left)
    layout = weight.layout
    if isinstance(other, Weight):
        return Sum(weight, other, layout) if other.layout.axes == layout.axes else None
    if not _fits(other, weight):
        return None
    other, kinds = jnp.asarray(other), _kinds(other, weight)
    if not {"i", "o"} <= kinds:
        side: Side = "i" if "i" in kinds else "o"
        numbers = _canonical(other, layout, ("s", side))[..., None, :]
        ones = jnp.ones((*layout.stack, 1, layout.matrix[side == "i"]), numbers.dtype)
        return LowRank(weight, *((numbers, ones) if side == "i" else (ones, numbers)), layout)
    return Sum(weight, jnp.broadcast_to(other, weight.shape), layout)


def summed(eqn: Any, operands: list[Any]) -> Array | None:
    """`w.sum(axis)` over all inputs or all outputs: a product with ones."""
    (weight,) = operands
    side = _side_of_sum(eqn, weight)
    if side is None:
        return None
    ones = jnp.ones((*weight.layout.stack, 1, weight.layout.matrix[side == "o"]), weight.dtype)
    sums = rows_through(ones, weight, weight.layout, side)[..., 0, :]
    return _reduced(sums, weight, eqn.params["axes"], side).astype(weight.dtype)


def sums_of_squares(jaxpr: Any, eqn: Any, operands: list[Any]) -> tuple[dict[Any, Array], set[int]] | None:
    """What a jaxpr makes of the squares of a weight where it only sums them, over all inputs or all outputs.

    Args:
        jaxpr: the equation's.
        eqn: any.
        operands: its.

    Returns:
        The sums by their variables, and the identities of the equations that need not run; None for other
        equations than squares, and where the squares themselves are used.
    """
    weight = operands[0] if operands else None
    if not isinstance(weight, Weight) or not _is_square(eqn):
        return None
    readers = _readers(jaxpr, eqn.outvars[0])
    if readers is None:
        return None
    found: dict[Any, Array] = {}
    for reader in readers:
        if reader.primitive.name != "reduce_sum":
            continue
        side = _side_of_sum(reader, weight)
        if side is None:
            return None
        (out,) = reader.outvars
        squares = squared_norms(weight, weight.layout, side)
        found[out] = _reduced(squares, weight, reader.params["axes"], side).astype(out.aval.dtype)
    return found, {id(reader) for reader in readers}


def _readers(jaxpr: Any, variable: Any) -> list[Any] | None:
    """The equations that sum a variable, cast or not, and those casts; None where it has another use."""
    if any(variable is out for out in jaxpr.outvars):
        return None
    found: list[Any] = []
    for eqn in jaxpr.eqns:
        if not any(variable is operand for operand in eqn.invars):
            continue
        if eqn.primitive.name == "reduce_sum":
            found.append(eqn)
            continue
        later = _readers(jaxpr, eqn.outvars[0]) if eqn.primitive.name == "convert_element_type" else None
        if later is None:
            return None
        found += [eqn, *later]
    return found


def _is_square(eqn: Any) -> bool:
    """Whether the equation squares its operand: `w * w`, `w ** 2`, `jnp.square(w)`."""
    name = eqn.primitive.name
    if name == "mul":
        return eqn.invars[0] is eqn.invars[1]
    return name == "square" or (name == "integer_pow" and eqn.params["y"] == 2)


def _negative(weight: Weight) -> Weight:
    return Scaled(weight, jnp.full(weight.layout.stack, -1.0, jnp.float32), weight.layout)


def _fits(other: Any, weight: Weight) -> bool:
    """Whether the other operand of an equation broadcasts to the weight, which is one of real numbers."""
    shape = jnp.shape(other)
    alike = len(shape) in (0, weight.ndim) and all(n in (1, m) for n, m in zip(shape, weight.shape))
    return alike and jnp.issubdtype(weight.dtype, jnp.floating)


def _kinds(other: Any, weight: Weight) -> set[str]:
    """The kinds of the weight's axes along which the other operand varies."""
    return {axis.kind for axis, n in zip(weight.layout.axes, jnp.shape(other)) if n > 1}


def _canonical(numbers: Array, layout: Layout, kinds: tuple[Kind, ...]) -> Array:
    """Numbers that broadcast to the logical shape and vary along these kinds of axes alone: `[*stack, n]`."""
    at = sum((layout.positions(kind) for kind in kinds), ())
    numbers = numbers.reshape(numbers.shape or (1,) * len(layout.axes))
    others = tuple(p for p in range(numbers.ndim) if p not in at)
    numbers = lax.transpose(numbers, (*others, *at)).reshape([numbers.shape[p] for p in at])
    whole = jnp.broadcast_to(numbers, [layout.shape[p] for p in at])
    return whole.reshape(layout.stack if kinds == ("s",) else (*layout.stack, -1))


def _side_of_sum(eqn: Any, weight: Weight) -> Side | None:
    axes = set(eqn.params["axes"])
    for side in ("i", "o"):
        if axes == set(weight.layout.positions(side)):
            return side
    return None


def _reduced(numbers: Array, weight: Weight, axes: tuple[int, ...], side: Side) -> Array:
    """Numbers `[*stack, n]` of the side that is left as a sum over `axes` gives them."""
    whole = side_to_logical(numbers, weight.layout, "o" if side == "i" else "i")
    return lax.squeeze(whole, axes)
