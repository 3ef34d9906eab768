"""The views that a model takes of a structured weight: weights whose parts are views of its parts."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import GatherScatterMode
from jax.sharding import PartitionSpec

from peftjax.core.tree import Opaque
from peftjax.weights.contraction import Gather
from peftjax.weights.layout import Layout, Side


class Views(Opaque, abc.ABC):
    """A weight with a layout, and with parts that follow its views by the roles of their fields.

    Each view is None where the weight has no such view without being densified.
    """

    layout: Layout
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # those of the subclasses, which are dataclasses

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.layout.shape

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.layout.axes)

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
            lambda w: w.map_stack(position, fn, size) if isinstance(w, Views) else fn(w, position),
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
                if isinstance(w, Views)
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

        return self._rebuild(layout, lambda w: w.as_stack(position) if isinstance(w, Views) else w, stacked)

    def divides(self, spec: PartitionSpec, sides: Sequence[Side]) -> bool:
        """Whether a sharding of the logical axes divides an axis of these sides."""
        full = (*spec, *(None,) * (self.ndim - len(spec)))
        return any(full[position] is not None for side in sides for position in self.layout.positions(side))

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

        specs = self._rebuild(
            self.layout,
            lambda w: w.part_specs(spec) if isinstance(w, Views) else PartitionSpec(*full),
            of_part,
        )
        whole = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["role"] == "shared"}
        whole = {name: jax.tree.map(lambda _: PartitionSpec(), part) for name, part in whole.items()}
        return None if specs is None else replace(specs, **whole)

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
            if isinstance(w, Views):
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
            if isinstance(part, Views):
                return part.cast(dtype)
            floating = jnp.issubdtype(part.dtype, jnp.floating)
            return lax.convert_element_type(part, dtype) if floating else part

        return self._with_parts(self.layout, cast, cast)

    def elementwise(self, fn: Callable[[Array], Array]) -> Self:
        """The weight with every part passed through an identity such as a sharding constraint."""

        def through(part: Any, _: Side | None = None) -> Any:
            return part.elementwise(fn) if isinstance(part, Views) else fn(part)

        return self._with_parts(self.layout, through, through)

    def on_base(self, fn: Callable[[Any], Any]) -> Self:
        """The weight with only the parts of its logical shape passed through `fn`."""
        return self._with_parts(
            self.layout, lambda w: w.on_base(fn) if isinstance(w, Views) else fn(w), _same
        )

    def stack_first(self) -> Self | None:
        """The weight with the stack axis at logical position 0 first in every part, for a scan."""
        axis = self.layout.axes[0]
        if axis.kind != "s":
            return None
        places = [a.place if a.kind != "s" else _moved_first(a.place, axis.place) for a in self.layout.axes]
        axes = tuple(replace(a, place=place) for a, place in zip(self.layout.axes, places))
        return self._rebuild(
            replace(self.layout, axes=axes),
            lambda w: w.stack_first() if isinstance(w, Views) else w,
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
            part.draws if isinstance(part, Views) else random and part is not None for part, random in parts
        )

    def with_keys(self, fn: Callable[[Array], Array]) -> Self:
        """The weight with its keys for dropout passed through `fn`."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            part = getattr(self, f.name)
            if isinstance(part, Views):
                changes[f.name] = part.with_keys(fn)
            elif f.metadata.get("random") and part is not None:
                changes[f.name] = fn(part)
        return replace(self, **changes)

    def divided_with(self, activations: Sequence[tuple[Sequence[int], PartitionSpec]]) -> Self:
        """The weight inside a `shard_map` that divides activations of these shapes in these ways.

        What a weight has for each row of a batch is divided as the batch is.
        """
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        inner = {n: part.divided_with(activations) for n, part in parts.items() if isinstance(part, Views)}
        return replace(self, **inner)

    def relabeled(self, fn: Callable[[Layout], Layout]) -> Self:
        """The same parts under another layout, after a scan took or gave a leading axis."""
        return self._with_parts(
            fn(self.layout), lambda w: w.relabeled(fn) if isinstance(w, Views) else w, _same
        )

    def _view(self, layout: Layout, fn: Callable[[Any], Any]) -> Self | None:
        return self._rebuild(layout, fn, _same)

    def _with_parts(
        self,
        layout: Layout,
        on_logical: Callable[[Any], Any],
        on_canonical: Callable[[Array, Side | None], Any],
    ) -> Self:
        """As `_rebuild`, of functions that have an image of every part."""
        view = self._rebuild(layout, on_logical, on_canonical)
        assert view is not None
        return view

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
            if part is None or f.metadata["role"] in ("static", "shared"):
                continue
            if f.metadata["role"] == "logical":
                changes[f.name] = on_logical(part)
            elif f.metadata["role"] == "stacked":
                changes[f.name] = jax.tree.map(lambda array: on_canonical(array, None), part)
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
    """How members of a stack are taken from one part: past its end, floats are zero and others arbitrary.

    The base alone has the fill value, so that an undefined one reaches no gradient of the parts.
    """
    if dict(options).get("mode") != GatherScatterMode.FILL_OR_DROP:
        return options
    if jnp.issubdtype(part.dtype, jnp.floating):
        return tuple((dict(options) | {"fill_value": 0}).items())
    return tuple((dict(options) | {"mode": GatherScatterMode.CLIP, "fill_value": None}).items())


class WholeMatrices(Views):
    """A weight of which only the stack can be cut, reversed or divided: a part of a matrix is none of it."""

    def slice_features(self, position: int, cut: range) -> None:
        """None."""

    def reverse(self, position: int) -> Self | None:
        """A reversed stack."""
        return super().reverse(position) if self.layout.axes[position].kind in "s1" else None

    def as_stack(self, position: int) -> None:
        """None."""

    def part_specs(self, spec: PartitionSpec) -> Self | None:
        """None where inputs or outputs are divided."""
        return None if self.divides(spec, ("i", "o")) else super().part_specs(spec)

    def gather_features(
        self, position: int, mesh_axes: Sequence[str], fn: Callable[[Array, int], Array], size: int
    ) -> None:
        """None, as there are no divided features."""


def transpose(w: Any, permutation: Sequence[int]) -> Any:
    """Transpose an array or a structured weight."""
    return w.transpose(permutation) if isinstance(w, Views) else lax.transpose(w, permutation)


def reshape(w: Any, shape: Sequence[int]) -> Any:
    """Reshape an array or a structured weight."""
    return w.reshape(shape) if isinstance(w, Views) else lax.reshape(w, tuple(shape))


def slice_features(w: Any, position: int, cut: range) -> Any:
    """A slice of an array along an axis, or of a structured weight (None where it has no such view)."""
    if isinstance(w, Views):
        return w.slice_features(position, cut)
    return lax.slice_in_dim(w, cut.start, cut.stop, cut.step, position)


def reverse(w: Any, position: int) -> Any:
    """An array, or a structured weight, reversed along an axis."""
    return w.reverse(position) if isinstance(w, Views) else lax.rev(w, (position,))
