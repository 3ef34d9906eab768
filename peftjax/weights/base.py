"""What every structured weight is: a frozen pytree that a model uses where it expects an array.

A subclass declares its fields by role, so that the views a model takes of a weight need no code of
their own:

- `logical()`: an array or weight of the logical shape (the base);
- `canonical(side)`: an array with the canonical stack axes first; its last axis runs over the inputs
  ('i'), the outputs ('o') or neither (None): factors, magnitudes, keys;
- `random_key()`: keys for dropout, with the canonical stack axes;
- `static()`: a Python value that is part of the compiled program.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import GatherScatterMode
from jax.sharding import PartitionSpec

from peftjax.core.errors import PeftError
from peftjax.core.tree import Opaque
from peftjax.weights.layout import Layout, Side
from peftjax.weights.rules import Conv, Dot, Gather, RaggedDot, Rule, met_axes
from peftjax.weights.sharding import like

W = TypeVar("W", bound="type[Weight]")


def logical() -> Any:
    """A field that holds an array, or a weight, of the logical shape."""
    return field(metadata={"role": "logical"})


def canonical(side: Side | None = None, default: Any = ...) -> Any:
    """A field that holds an array `[*stack, ...]`, or None, and what its last axis runs over."""
    metadata = {"role": "canonical", "side": side}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def random_key() -> Any:
    """A field that holds keys `[*stack]` for dropout, or None."""
    return field(default=None, metadata={"role": "canonical", "side": None, "random": True})


def static(default: Any = ...) -> Any:
    """A field that holds a hashable Python value."""
    metadata = {"role": "static"}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def structured(cls: W) -> W:
    """Make a `Weight` subclass a frozen dataclass and a pytree whose static fields are metadata."""
    cls = dataclass(frozen=True, eq=False)(cls)
    meta = [f.name for f in fields(cls) if f.metadata["role"] == "static"]
    data = [f.name for f in fields(cls) if f.metadata["role"] != "static"]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


class Weight(Opaque, abc.ABC):
    """A weight that is not one dense array; it has the shape and dtype of the array it stands for.

    A subclass gives `dense()` and, where its method has an activation-space form, its own `dot`,
    `gather`, `conv` and `ragged_dot`. The ones given here merge the weight inside the layer and keep
    none of the merged weight for the backward pass.
    """

    base: Any
    layout: Layout
    may_mix: ClassVar[bool] = True  # whether its stack may be summed over, as the experts of a router

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.layout.shape

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.layout.axes)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return self.base.dtype

    @abc.abstractmethod
    def dense(self) -> Array:
        """The array this weight stands for."""

    def supports(self, rule: Rule) -> bool:
        """Whether the rule can be applied without forming the dense weight for longer than a layer."""
        return True

    def dot(self, x: Array, rule: Dot) -> Array:
        """X times this weight."""
        return lazily_merged(rule, x, self)

    def gather(self, indices: Array, rule: Gather) -> Array:
        """Rows of this weight."""
        return lazily_merged(rule, indices, self)

    def conv(self, x: Array, rule: Conv) -> Array:
        """X convolved with this weight."""
        return lazily_merged(rule, x, self)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """Rows of x times their experts' matrices."""
        return lazily_merged(rule, x, self)

    # Views. Each returns None when the weight has no such view without being densified.

    def transpose(self, permutation: Sequence[int]) -> Self | None:
        """`jnp.transpose(w, permutation)`."""
        return self._view(self.layout.transpose(permutation), lambda w: transpose(w, permutation))

    def reshape(self, shape: Sequence[int]) -> Self | None:
        """`jnp.reshape(w, shape)`, where no input axis mixes with an output or stack axis."""
        layout = self.layout.reshape(shape)
        return None if layout is None else self._view(layout, lambda w: reshape(w, shape))

    def map_stack(self, position: int, fn: Callable[[Array, int], Array], size: int | None) -> Self | None:
        """`fn(array, axis)` along one stack axis of every part; `size` None means fn removes it."""
        axis = self.layout.axes[position]
        if axis.kind != "s":
            return None
        if size is None:
            layout = self.layout.drop(position)
        else:
            sizes = list(self.shape)
            sizes[position] = size
            layout = self.layout.resized(sizes)
        return self._rebuild(
            layout,
            lambda w: w.map_stack(position, fn, size) if isinstance(w, Weight) else fn(w, position),
            lambda part, _: fn(part, axis.place),
        )

    def take_stack(self, position: int, indices: Array, options: tuple[tuple[str, Any], ...]) -> Self | None:
        """The members `indices` `[*n, 1]` of one stack axis; the axes n come first and are stacks too."""
        axis, given = self.layout.axes[position], dict(options)
        fill = given.get("fill_value") if given.get("mode") == GatherScatterMode.FILL_OR_DROP else None
        if not (fill is None or fill == 0 or fill != fill):
            return None  # only zeros and undefined numbers are the product of filled parts too
        layout = self.layout.drop(position)
        for size in reversed(indices.shape[:-1]):
            layout = layout.with_stack(0, size)
        return self._rebuild(
            layout,
            lambda w: (
                w.take_stack(position, indices, options)
                if isinstance(w, Weight)
                else Gather(position, options)(indices, w)
            ),
            lambda part, _: Gather(axis.place, _for_part(part, options))(indices, part),
        )

    def slice_features(self, position: int, cut: range) -> Self | None:
        """`w[start:stop:step]` along the only input or the only output axis."""
        kind = self.layout.axes[position].kind
        if len(self.layout.positions(kind)) > 1:
            return None
        sizes = list(self.shape)
        sizes[position] = len(cut)
        return self._rebuild(
            self.layout.resized(sizes),
            lambda w: slice_features(w, position, cut),
            lambda part, side: slice_features(part, part.ndim - 1, cut) if side == kind else part,
        )

    def reverse(self, position: int) -> Self | None:
        """`jnp.flip(w, position)`."""
        axis = self.layout.axes[position]
        if axis.kind == "1":
            return self
        if axis.kind == "s":
            return self.map_stack(position, lambda part, at: lax.rev(part, (at,)), axis.size)
        sizes, place = self.layout.sizes(axis.kind), self.layout.positions(axis.kind).index(position)

        def along_side(part: Array, side: Side | None) -> Array:
            if side != axis.kind:
                return part
            apart = part.reshape(*part.shape[:-1], *sizes)
            return lax.rev(apart, (part.ndim - 1 + place,)).reshape(part.shape)

        return self._rebuild(self.layout, lambda w: reverse(w, position), along_side)

    def as_stack(self, position: int) -> Self | None:
        """The same weight with one of several axes of its inputs, or of its outputs, read as a stack."""
        axis, n = self.layout.axes[position], len(self.layout.stack)
        sizes = self.layout.sizes(axis.kind)
        if axis.kind not in ("i", "o") or len(sizes) < 2:
            return None
        place = self.layout.positions(axis.kind).index(position)
        layout = self.layout.drop(position).with_stack(position, axis.size, n)

        def stacked(part: Array, side: Side | None) -> Array:
            if side != axis.kind:
                whole = (*part.shape[:n], axis.size, *part.shape[n:])
                return jnp.broadcast_to(jnp.expand_dims(part, n), whole)
            apart = part.reshape(*part.shape[:-1], *sizes)
            apart = jnp.moveaxis(apart, part.ndim - 1 + place, n)
            return apart.reshape(*apart.shape[: part.ndim], -1)

        return self._rebuild(layout, lambda w: w.as_stack(position) if isinstance(w, Weight) else w, stacked)

    def part_specs(self, spec: PartitionSpec) -> Self | None:
        """The same structure with the sharding of each part in its place, from that of the whole.

        A factor shards along its weight's axis of the same side; other parts only along the stack.
        None when the side's sharded axis is not the first of several that its factor flattens.
        """
        full = (*spec, *(None,) * (self.ndim - len(spec)))
        stack = tuple(full[p] for p in self.layout.positions("s"))

        def of_part(part: Array, side: Side | None) -> PartitionSpec | None:
            middle = (None,) * (part.ndim - len(stack) - (side is not None))
            if side is None:
                return PartitionSpec(*stack, *middle)
            first, *others = (full[p] for p in self.layout.positions(side))
            return None if any(others) else PartitionSpec(*stack, *middle, first)

        return self._rebuild(
            self.layout,
            lambda w: w.part_specs(spec) if isinstance(w, Weight) else PartitionSpec(*full),
            of_part,
        )

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> Self | None:
        """The weight with an input or output axis gathered from the shards of `shard_map`.

        None when the axis is not the first of several that its factor flattens.

        Args:
            position: of the axis.
            mesh_axes: what it is gathered over.
            fn: `(part, axis) -> part`, gathered.
            size: that the axis has then.
        """
        axis = self.layout.axes[position]
        if axis.kind not in "io" or axis.place != 0:
            return None
        sizes = list(self.shape)
        sizes[position] = size

        def gathered(w: Any) -> Any:
            if isinstance(w, Weight):
                return w.gather_features(position, mesh_axes, fn, size)
            return fn(w, position)

        return self._rebuild(
            self.layout.resized(sizes),
            gathered,
            lambda part, side: fn(part, part.ndim - 1) if side == axis.kind else part,
        )

    def cast(self, dtype: Any) -> Self:
        """The weight with its floating-point parts in another dtype."""

        def cast(part: Any, _: Side | None = None) -> Any:
            if isinstance(part, Weight):
                return part.cast(dtype)
            floating = jnp.issubdtype(part.dtype, jnp.floating)
            return lax.convert_element_type(part, dtype) if floating else part

        return self._rebuild(self.layout, cast, cast)

    def elementwise(self, fn: Callable[[Array], Array]) -> Self:
        """The weight with every part passed through an identity such as a sharding constraint."""

        def through(part: Any, _: Side | None = None) -> Any:
            return part.elementwise(fn) if isinstance(part, Weight) else fn(part)

        return self._rebuild(self.layout, through, through)

    def on_base(self, fn: Callable[[Any], Any]) -> Self:
        """The weight with only the parts of its logical shape passed through `fn`."""
        return self._rebuild(self.layout, lambda w: w.on_base(fn) if isinstance(w, Weight) else fn(w), _same)

    def stack_first(self) -> Self | None:
        """The weight with the stack axis at logical position 0 first in every part, for a scan."""
        axis = self.layout.axes[0]
        if axis.kind != "s":
            return None
        places = [a.place if a.kind != "s" else _moved_first(a.place, axis.place) for a in self.layout.axes]
        axes = tuple(replace(a, place=place) for a, place in zip(self.layout.axes, places))
        return self._rebuild(
            replace(self.layout, axes=axes),
            lambda w: w.stack_first() if isinstance(w, Weight) else w,
            lambda part, _: jnp.moveaxis(part, axis.place, 0),
        )

    def members(self) -> tuple[Self, Any] | None:
        """The weight with the stack axis at logical position 0 first, and its `in_axes` for a `vmap`."""
        first = self.stack_first()
        return None if first is None else (first, 0)

    @property
    def draws(self) -> bool:
        """Whether a part of this weight draws random numbers, for dropout."""
        parts = [(getattr(self, f.name), f.metadata.get("random", False)) for f in fields(self)]
        return any(
            part.draws if isinstance(part, Weight) else random and part is not None for part, random in parts
        )

    def with_keys(self, fn: Callable[[Array], Array]) -> Self:
        """The weight with its keys for dropout passed through `fn`."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            part = getattr(self, f.name)
            if isinstance(part, Weight):
                changes[f.name] = part.with_keys(fn)
            elif f.metadata.get("random") and part is not None:
                changes[f.name] = fn(part)
        return replace(self, **changes)

    def divided_with(self, activations: Sequence[tuple[Sequence[int], PartitionSpec]]) -> Self:
        """The weight inside a `shard_map` that divides activations of these shapes in these ways.

        What a weight has for each row of a batch is divided as the batch is.
        """
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        inner = {n: part.divided_with(activations) for n, part in parts.items() if isinstance(part, Weight)}
        return replace(self, **inner)

    def relabeled(self, fn: Callable[[Layout], Layout]) -> Self:
        """The same parts under another layout, after a scan took or gave a leading axis."""
        return self._rebuild(
            fn(self.layout), lambda w: w.relabeled(fn) if isinstance(w, Weight) else w, _same
        )

    def _replace(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def _view(self, layout: Layout, fn: Callable[[Any], Any]) -> Self | None:
        return self._rebuild(layout, fn, _same)

    def _rebuild(
        self,
        layout: Layout,
        on_logical: Callable[[Any], Any],
        on_canonical: Callable[[Array, Side | None], Any],
    ) -> Self | None:
        """A copy with each part passed through the function of its role; None if one has no image."""
        changes: dict[str, Any] = {"layout": layout}
        for f in fields(self):
            part = getattr(self, f.name)
            if part is None or f.metadata["role"] == "static":
                continue
            if f.metadata["role"] == "logical":
                changes[f.name] = on_logical(part)
            else:
                changes[f.name] = on_canonical(part, f.metadata["side"])
            if changes[f.name] is None:
                return None
        return replace(self, **changes)


def _same(part: Array, side: Side | None) -> Array:
    return part


def _moved_first(place: int, first: int) -> int:
    return 0 if place == first else place + (place < first)


def _for_part(part: Array, options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """How members of a stack are taken of one part: outside of it, floats are zero and others anything.

    The base alone has the fill value, so that an undefined one reaches no gradient of the parts.
    """
    if dict(options).get("mode") != GatherScatterMode.FILL_OR_DROP:
        return options
    if jnp.issubdtype(part.dtype, jnp.floating):
        return tuple((dict(options) | {"fill_value": 0}).items())
    return tuple((dict(options) | {"mode": GatherScatterMode.CLIP, "fill_value": None}).items())


def transpose(w: Any, permutation: Sequence[int]) -> Any:
    """Transpose an array or a structured weight."""
    return w.transpose(permutation) if isinstance(w, Weight) else lax.transpose(w, permutation)


def reshape(w: Any, shape: Sequence[int]) -> Any:
    """Reshape an array or a structured weight."""
    return w.reshape(shape) if isinstance(w, Weight) else lax.reshape(w, tuple(shape))


def slice_features(w: Any, position: int, cut: range) -> Any:
    """A slice of an array along an axis, or of a structured weight (None where it has no such view)."""
    if isinstance(w, Weight):
        return w.slice_features(position, cut)
    return lax.slice_in_dim(w, cut.start, cut.stop, cut.step, position)


def reverse(w: Any, position: int) -> Any:
    """An array, or a structured weight, the other way round along an axis."""
    return w.reverse(position) if isinstance(w, Weight) else lax.rev(w, (position,))


def dense(w: Any) -> Array:
    """The array itself, or the array that a structured weight stands for."""
    return w.dense() if isinstance(w, Weight) else w


def cast(w: Any, dtype: Any) -> Any:
    """An array, or every float part of a structured weight, in another dtype."""
    return w.cast(dtype) if isinstance(w, Weight) else w.astype(dtype)


def contract(x: Array, w: Any, rule: Rule) -> Array:
    """Apply a rule to an activation and an array or a structured weight: the one way weights act."""
    if not isinstance(w, Weight):
        return rule(x, w)
    _require_way(w, rule)
    if isinstance(rule, Gather):
        return _looked_up(x, w, rule)
    method = {Dot: w.dot, Conv: w.conv, RaggedDot: w.ragged_dot}[type(rule)]
    return method(_promoted(x, w, rule), rule)


def _require_way(w: Weight, rule: Rule) -> None:
    """Raise a PeftError where an activation meets the outputs of a weight whose axes are guessed."""
    if w.layout.one_way and set(met_axes(rule)) & set(w.layout.positions("o")):
        raise PeftError(
            f"{w.layout.name}: an activation meets the side that was taken for the output, since the name "
            "does not tell the axes: give those of the parameter, such as "
            f"layouts={{{w.layout.name!r}: 'oi'}}, or layouts=peftjax.layouts_of(f, params, *inputs)"
        )


def _looked_up(indices: Array, w: Weight, rule: Gather) -> Array:
    """Rows of w, those outside it as the lookup's mode says: once for all parts, which see valid numbers.

    A row that is filled in reaches no part: neither its fill value nor the (masked, perhaps undefined)
    cotangent that comes back for it.
    """
    options = dict(rule.options)
    mode, fill = options.get("mode"), options.get("fill_value")
    if mode not in (GatherScatterMode.FILL_OR_DROP, GatherScatterMode.CLIP):
        return w.gather(indices, rule)
    last = min(w.shape[rule.axis] - 1, jnp.iinfo(indices.dtype).max)
    # Numbers that are clipped may be equal.
    options |= {"mode": GatherScatterMode.CLIP, "fill_value": None, "unique_indices": False}
    rows = w.gather(jnp.clip(indices, 0, last), Gather(rule.axis, tuple(options.items())))
    if mode == GatherScatterMode.CLIP:
        return rows

    @jax.checkpoint  # backward keeps the numbers alone, and no mask of the rows' size
    def filled(rows: Array, indices: Array) -> Array:
        inside = (indices == jnp.clip(indices, 0, last))[..., 0]
        inside = lax.broadcast_in_dim(inside, rows.shape, range(inside.ndim))
        return jnp.where(like(inside, rows), rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))

    return filled(rows, indices)


def _promoted(x: Array, w: Weight, rule: Dot | Conv | RaggedDot) -> Array:
    """X in a dtype that the parts of w can be cast to.

    Integers, booleans and floats of one byte take the dtype that jnp gives the product: parts cast to
    theirs would be truncated, and lose their gradient.
    """
    if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 1:
        return x
    asked = None if rule.preferred is None else jnp.dtype(rule.preferred)
    wider = asked is not None and jnp.issubdtype(asked, jnp.inexact) and asked.itemsize > w.dtype.itemsize
    return x.astype(asked if wider else w.dtype)


def matmul(x: Array, w: Any) -> Array:
    """`x @ w` for an activation `[..., in]` and an array or structured weight `[in, out]`."""
    return contract(x, w, Dot(x_contract=(x.ndim - 1,), w_contract=(0,)))


def lazily_merged(rule: Callable[[Array, Array], Array], x: Array, w: Weight) -> Array:
    """The rule on x and the dense weight, which is made again in backward: only its parts are kept."""
    return jax.checkpoint(lambda x, w: rule(x, w.dense()))(x, w)
