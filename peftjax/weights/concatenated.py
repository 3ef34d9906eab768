"""Weights that a model puts one behind another, or on top of each other, before it uses them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core.shapes import match_sizes
from peftjax.weights.base import Weight, contract, dense
from peftjax.weights.composed import Composed
from peftjax.weights.contraction import Contraction, Conv, Dot, Gather, RaggedDot
from peftjax.weights.fields import static, structured, tuple_of_parts
from peftjax.weights.layout import Layout
from peftjax.weights.views import reshape, reverse, slice_features


@structured
class Concatenated(Composed):
    """Arrays and weights, at least one, concatenated along the axis `position`; each acts for itself."""

    parts: tuple[Any, ...] = tuple_of_parts()
    position: int = static()
    layout: Layout = static()

    @property
    def dtype(self) -> jnp.dtype:
        """That of all parts."""
        return self.parts[0].dtype

    def dense(self) -> Array:
        """The parts, dense, one behind another."""
        return lax.concatenate([dense(part) for part in self.parts], self.position)

    def supports(self, rule: Contraction) -> bool:
        """What all parts support, where the axis of the parts is no window and no axis of experts."""
        p = self.position
        if isinstance(rule, Conv) and (
            p not in rule.dimension_numbers.rhs_spec[:2] or rule.feature_group_count > 1
        ):
            return False
        if isinstance(rule, RaggedDot) and p in (rule.w_group, *rule.w_batch):
            return False
        return all(part.supports(rule) for part in self.parts if isinstance(part, Weight))

    def dot(self, x: Array, rule: Dot) -> Array:
        """The products with all parts: summed, or one behind another."""
        p = self.position
        if p in rule.w_contract:
            return self._summed(x, rule.x_contract[rule.w_contract.index(p)], rule)
        if p in rule.w_batch:
            at = rule.w_batch.index(p)
            pieces = zip(self._pieces(x, rule.x_batch[at]), self.parts)
            return lax.concatenate([contract(piece, part, rule) for piece, part in pieces], at)
        used = {*rule.w_contract, *rule.w_batch}
        left = [q for q in range(self.ndim) if q not in used]
        return self._along_result(x, rule, left, len(rule.w_batch) if rule.weight_first else None)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """Rows of the part that they lie in, or rows of all parts one behind another."""
        if rule.axis != self.position:
            left = [q for q in range(self.ndim) if q != rule.axis]
            return self._along_result(indices, rule, left, indices.ndim - 1)
        found, start = None, 0
        for part in self.parts:
            size = part.shape[rule.axis]
            rows = contract(jnp.clip(indices - start, 0, size - 1), part, rule)
            if found is not None:
                later = lax.broadcast_in_dim(indices[..., 0] >= start, rows.shape, range(indices.ndim - 1))
                rows = jnp.where(later, rows, found)
            found, start = rows, start + size
        assert found is not None  # at least one part
        return found

    def conv(self, x: Array, rule: Conv) -> Array:
        """The convolutions with all parts: summed, or their channels one behind another."""
        numbers = rule.dimension_numbers
        if self.position == numbers.rhs_spec[1]:
            return self._summed(x, numbers.lhs_spec[1], rule)
        return lax.concatenate([contract(x, part, rule) for part in self.parts], numbers.out_spec[1])

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """The ragged products with all parts: summed, or one behind another."""
        if self.position in rule.w_contract:
            return self._summed(x, rule.x_contract[rule.w_contract.index(self.position)], rule)
        used = {*rule.w_contract, *rule.w_batch, rule.w_group}
        return self._along_result(x, rule, [q for q in range(self.ndim) if q not in used], None)

    def transpose(self, permutation: Sequence[int]) -> Self | None:
        """Every part transposed."""
        view = super().transpose(permutation)
        return None if view is None else replace(view, position=list(permutation).index(self.position))

    def reshape(self, shape: Sequence[int]) -> Self | None:
        """Every part reshaped, where the axis of the parts stays the outermost of those it mixes with."""
        new = 0
        for old, sizes in match_sizes(self.shape, tuple(shape)) or ():
            if self.position in old:
                break
            new += len(sizes)
        else:
            return None
        if old[0] != self.position or not sizes:
            return None
        one = math.prod(sizes[1:])
        of_parts = [math.prod(part.shape[q] for q in old) for part in self.parts]
        if any(n % one for n in of_parts):
            return None
        shapes = [(*shape[:new], n // one, *shape[new + 1 :]) for n in of_parts]
        return self._with([reshape(part, s) for part, s in zip(self.parts, shapes)], new)

    def map_stack(self, position: int, fn: Callable[[Array, int], Array], size: int | None) -> Self | None:
        """Every part mapped along another axis than theirs."""
        if position == self.position or self.layout.axes[position].kind != "s":
            return None
        parts = [
            part.map_stack(position, fn, size) if isinstance(part, Weight) else fn(part, position)
            for part in self.parts
        ]
        return self._with(parts, self.position - (size is None and position < self.position))

    def take_stack(self, position: int, indices: Array, options: tuple[tuple[str, Any], ...]) -> Self | None:
        """Members of a stack axis that all parts have."""
        if position == self.position:
            return None
        parts = [
            part.take_stack(position, indices, options)
            if isinstance(part, Weight)
            else Gather(position, options)(indices, part)
            for part in self.parts
        ]
        return self._with(parts, self.position - (position < self.position) + indices.ndim - 1)

    def slice_features(self, position: int, cut: range) -> Any:
        """Every part sliced; along their own axis, those parts that lie in the slice."""
        if position != self.position:
            return self._with([slice_features(part, position, cut) for part in self.parts], self.position)
        parts, start = [], 0
        for part in self.parts:
            size = part.shape[position]
            inside = [n - start for n in cut if start <= n < start + size]
            if inside == list(range(size)):
                parts.append(part)
            elif inside:
                own = range(inside[0], inside[-1] + 1, cut.step)
                parts.append(slice_features(part, position, own))
            start += size
        return self._with(parts, position)

    def reverse(self, position: int) -> Self | None:
        """Every part reversed; along their own axis, the last one first."""
        parts = [reverse(part, position) for part in self.parts]
        return self._with(parts[::-1] if position == self.position else parts, self.position)

    def as_stack(self, position: int) -> Self | None:
        """Every part with another axis than theirs as a stack."""
        parts = [part.as_stack(position) if isinstance(part, Weight) else part for part in self.parts]
        return None if position == self.position else self._with(parts, self.position)

    def relabeled(self, fn: Callable[[Layout], Layout]) -> Self:
        """The same parts under another layout; axes come and go at the front."""
        layout = fn(self.layout)
        parts = tuple(part.relabeled(fn) if isinstance(part, Weight) else part for part in self.parts)
        moved = len(layout.axes) - len(self.layout.axes)
        return replace(self, parts=parts, layout=layout, position=self.position + moved)

    @property
    def draws(self) -> bool:
        """Whether one of the parts draws random numbers."""
        return any(isinstance(part, Weight) and part.draws for part in self.parts)

    def with_keys(self, fn: Callable[[Array], Array]) -> Self:
        """The weight with the keys of its parts passed through `fn`."""
        parts = tuple(part.with_keys(fn) if isinstance(part, Weight) else part for part in self.parts)
        return replace(self, parts=parts)

    def _rebuild(self, layout: Layout, on_logical: Callable[[Any], Any], on_canonical: Any) -> Self | None:
        parts = tuple(on_logical(part) for part in self.parts)
        return None if any(p is None for p in parts) else replace(self, parts=parts, layout=layout)

    def _with(self, parts: Sequence[Any], position: int) -> Any:
        return None if any(p is None for p in parts) else concatenated(parts, position)

    def _pieces(self, x: Array, axis: int) -> list[Array]:
        sizes = [part.shape[self.position] for part in self.parts]
        return list(lax.split(x, sizes, axis))

    def _summed(self, x: Array, axis: int, rule: Contraction) -> Array:
        first, *others = map(lambda x, w: contract(x, w, rule), self._pieces(x, axis), self.parts)
        return sum(others, first)

    def _along_result(self, x: Array, rule: Contraction, left: list[int], first: int | None) -> Array:
        """What all parts give, along their axis in the result, where those `left` come from `first` on."""
        pieces = [contract(x, part, rule) for part in self.parts]
        start = pieces[0].ndim - len(left) if first is None else first
        return lax.concatenate(pieces, start + left.index(self.position))


def concatenated(parts: Sequence[Any], position: int) -> Any:
    """`jnp.concatenate(parts, position)` of arrays and weights.

    Weights of one structure become one along an axis of their stacks, or along one that the model added to
    stack them; otherwise each stays what it is.
    """
    if len(parts) == 1 or not any(isinstance(part, Weight) for part in parts):
        return parts[0] if len(parts) == 1 else lax.concatenate(parts, position)
    whole = _one_stack(parts, position)
    if whole is not None:
        return whole
    first = next(part for part in parts if isinstance(part, Weight))
    sizes = list(first.shape)
    sizes[position] = sum(part.shape[position] for part in parts)
    layout = first.layout.resized(sizes)
    return Concatenated(parts=tuple(parts), position=position, layout=layout)


def _one_stack(parts: Sequence[Any], position: int) -> Weight | None:
    """The weights of one structure as one, None where they are not."""
    first = parts[0]
    if not all(isinstance(p, Weight) and not isinstance(p, Concatenated) for p in parts):
        return None
    axis = first.layout.axes[position]
    if axis.kind not in ("s", "1"):
        return None
    # Their names and the sizes of that axis may differ.
    alike = [
        part.relabeled(lambda at: _resized_at(replace(at, name=first.layout.name), position, 0))
        for part in parts
    ]
    if len({jax.tree.structure(part) for part in alike}) > 1:
        return None
    place, size = (0 if axis.kind == "1" else axis.place), sum(p.shape[position] for p in parts)
    join = jnp.stack if axis.kind == "1" else jnp.concatenate

    def others(part: Array) -> tuple[int, ...]:
        return part.shape if axis.kind == "1" else (*part.shape[:place], *part.shape[place + 1 :])

    def joined(weights: Sequence[Weight]) -> Weight | None:
        layout = weights[0].layout
        layout = (
            layout.drop(position).with_stack(position, size)
            if axis.kind == "1"
            else _resized_at(layout, position, size)
        )
        changes: dict[str, Any] = {"layout": layout}
        for f in fields(weights[0]):
            values = [getattr(w, f.name) for w in weights]
            role = f.metadata["role"]
            if role == "static" or values[0] is None:
                continue
            if role == "shared":
                if any(value is not values[0] for value in values):
                    return None
                continue
            if isinstance(values[0], Weight):
                changes[f.name] = joined(values)
            elif role == "logical":
                changes[f.name] = lax.concatenate(values, position)
            elif role == "stacked":
                changes[f.name] = _joined_trees(values, partial(join, axis=place))
            elif len(set(map(others, values))) == 1:
                changes[f.name] = join(values, axis=place)
            else:
                return None  # such as factors of other ranks
            if changes[f.name] is None:
                return None
        return replace(weights[0], **changes)

    return joined(parts)


def _joined_trees(codes: Sequence[Any], join: Callable[..., Array]) -> Any:
    """Trees of one structure along a stack axis; None where they are of several."""
    if len({jax.tree.structure(one) for one in codes}) > 1:
        return None
    parts = [[leaf.shape for leaf in jax.tree.leaves(one)] for one in codes]
    if any(shapes != parts[0] for shapes in parts):
        return None
    return jax.tree.map(lambda *leaves: join(leaves), *codes)


def _resized_at(layout: Layout, position: int, size: int) -> Layout:
    sizes = list(layout.shape)
    sizes[position] = size
    return layout.resized(sizes)
