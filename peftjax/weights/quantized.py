"""A frozen weight of which there are codes of a few bits alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core.sharding import explicit_sharding
from peftjax.kernels.dequantized_matmul import dequantized_matmul
from peftjax.kernels.ragged_product import ragged_product_of
from peftjax.quantize.encoding import encode
from peftjax.quantize.groups import Format, Grid, GroupCodes
from peftjax.quantize.hadamard import rotated
from peftjax.weights.base import Weight, lazily_merged
from peftjax.weights.canonical import result_of_dot, side_of, to_canonical, to_logical
from peftjax.weights.contraction import Dot, Gather, RaggedDot
from peftjax.weights.fields import stacked, static, structured
from peftjax.weights.layout import Layout, Side
from peftjax.weights.sharding import whole


@structured
class Quantized(Weight):
    """`w = decode(codes)`, a weight without a base.

    A layer decodes it for its product, in the forward pass and again in the backward pass, which keeps the
    codes alone. A lookup of rows decodes those rows.

    Attributes:
        codes: `[*stack, rows, width]`; or `[*stack, 1, rows · width]`, where groups run on from row to row.
            Of a rotated format they are those of `R w`, R being of the inputs.
        layout: of the logical axes.
        of_dtype: of the array that it stands for.
        rows: the side whose axes the rows of the codes are; groups run along the other one.
    """

    codes: GroupCodes = stacked()
    layout: Layout = static()
    of_dtype: Any = static()
    rows: Side = static(default="o")

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this weight stands for."""
        return jnp.dtype(self.of_dtype)

    def dense(self) -> Array:
        """The decoded array, rounded once, from float32 to its dtype."""
        return self.decoded(lax.stop_gradient(self.codes))

    def decoded(self, codes: GroupCodes) -> Array:
        """The array that other codes of this weight's shape stand for; it differentiates their scales."""
        if not self.rotates:
            return self.arranged(replace(codes, dtype=self.dtype).decode())
        # Rounded once, after the rotation.
        matrices = self._in_rows(replace(codes, dtype=jnp.float32).decode())
        return self.arranged(_rotated_inputs(matrices, self.rows)).astype(self.dtype)

    def arranged(self, matrices: Array) -> Array:
        """An array in the order of the codes, `[*stack, rows, width]`, in the logical shape."""
        matrices = self._in_rows(matrices)
        return to_logical(matrices.swapaxes(-1, -2) if self.rows == "o" else matrices, self.layout)

    def _in_rows(self, matrices: Array) -> Array:
        n, m = self.layout.matrix
        return matrices.reshape(*self.layout.stack, *((m, n) if self.rows == "o" else (n, m)))

    @property
    def rotates(self) -> bool:
        """Whether the codes are of rotated inputs."""
        return self.codes.format.rotate

    def cast(self, dtype: Any) -> "Quantized":
        """The same codes, decoded to another dtype."""
        return replace(self, of_dtype=jnp.dtype(dtype))

    def dot(self, x: Array, rule: Dot) -> Array:
        """X times this weight, of which a tile at a time is decoded where there is a kernel for its codes."""
        return self.multiplied(x, rule) if self.multiplies(x, rule) else lazily_merged(rule, x, self)

    def multiplies(self, x: Array, rule: Dot) -> bool:
        """Whether `multiplied` has a way for the rule: x meets one whole side of one matrix."""
        return (
            not self.layout.stack
            and "1" not in self.layout.letters
            and not self._runs_on
            and side_of(self.layout, rule.w_contract) in (("i",) if self.rotates else ("i", "o"))
            and not rule.w_batch
            and rule.precision is None
            and rule.out_sharding is None
            and rule.preferred in (None, x.dtype)
            and x.dtype == self.dtype
            and self.codes.has_kernel
        )

    def multiplied(self, x: Array, rule: Dot, u: Array | None = None, v: Array | None = None) -> Array:
        """`x·w`, with `u·v` in the same sum where they are given.

        Args:
            x: the activation.
            rule: one that `multiplies` allows.
            u: `[free axes of x, r]`.
            v: `[r, n]`, n over the side that x does not meet.
        """
        side = side_of(self.layout, rule.w_contract)
        assert side is not None
        table, scales, shifts = self.codes.factors
        met = [rule.x_contract[rule.w_contract.index(p)] for p in self.layout.positions(side)]
        free = [n for n in range(x.ndim) if n not in met]
        lead = [x.shape[n] for n in free]
        x = lax.transpose(x, (*free, *met)).reshape(*lead, -1)
        x = rotated(x) if self.rotates else x
        transposed, codes = side == self.rows, self.codes.codes
        y = dequantized_matmul(
            x, codes, scales, shifts, u, v, table=table, group=self.codes.group, transposed=transposed
        )
        y = y.reshape(*lead, *self.layout.sizes("o" if side == "i" else "i"))
        return result_of_dot(y, rule, self.layout, side)

    def ragged_dot(self, x: Array, rule: RaggedDot) -> Array:
        """Rows of x times their experts' matrices, decoded one at a time where x goes in tiles."""
        side = side_of(self.layout, rule.w_contract)
        single = sorted(self.layout.letters) == ["i", "o", "s"] and not self._runs_on and not self.rotates
        along_rows = rule.of_rows and rule.x_contract == (1,) and rule.precision is None
        if side is None or not single or not along_rows or x.ndim != 2 or x.dtype != self.dtype:
            return lazily_merged(rule, x, self)
        return ragged_product_of(
            x,
            replace(lax.stop_gradient(self.codes), dtype=self.dtype),
            rule.group_sizes,
            decode=type(self.codes).decode,
            transposed=side != self.rows,
            preferred=rule.preferred,
        )

    def gather(self, indices: Array, rule: Gather) -> Array:
        """Rows of this weight, of which those alone are decoded."""
        side = side_of(self.layout, (rule.axis,))
        left = self.layout.positions("i" if side == "o" else "o")
        if self.rotates or side is None or left != tuple(p for p in range(self.ndim) if p != rule.axis):
            return lazily_merged(rule, indices, self)
        codes, numbers = replace(lax.stop_gradient(self.codes), dtype=self.dtype), indices[..., 0]
        if self._runs_on:
            found = self._found(codes, numbers[..., None], of_rows=side == self.rows)
        else:
            found = codes.take(numbers).decode() if side == self.rows else codes.at(numbers)
        return found.reshape(*indices.shape[:-1], *(self.shape[p] for p in left))

    def _found(self, codes: GroupCodes, numbers: Array, *, of_rows: bool) -> Array:
        """Whole rows, or the same places of all rows, of codes whose groups run on from row to row."""
        n, m = self.layout.matrix
        height, width = (m, n) if self.rows == "o" else (n, m)
        rows, places = (numbers, jnp.arange(width)) if of_rows else (jnp.arange(height), numbers)
        return codes.placed(jnp.zeros((), jnp.int32), rows * width + places)

    def slice_features(self, position: int, cut: range) -> "Quantized | None":
        """A slice of rows, or one of whole groups and bytes."""
        kind = self.layout.axes[position].kind
        if self._runs_on or self._turns(kind) or len(self.layout.positions(kind)) > 1:
            return None
        sizes = list(self.shape)
        sizes[position] = len(cut)
        if kind == self.rows:
            codes = self.codes.on_rows(
                lambda part: lax.slice_in_dim(part, cut.start, cut.stop, cut.step, part.ndim - 2)
            )
        else:
            codes = self.codes.cut(cut.start, cut.stop) if cut.step == 1 else None
        return None if codes is None else replace(self, codes=codes, layout=self.layout.resized(sizes))

    def reverse(self, position: int) -> "Quantized | None":
        """A reversed stack, or reversed rows."""
        kind = self.layout.axes[position].kind
        if kind in ("s", "1"):
            return super().reverse(position)
        if self._runs_on or self._turns(kind) or kind != self.rows:
            return None
        sizes, place = self.layout.sizes(kind), self.layout.positions(kind).index(position)

        def reversed_rows(part: Array) -> Array:
            apart = part.reshape(*part.shape[:-2], *sizes, part.shape[-1])
            return lax.rev(apart, (part.ndim - 2 + place,)).reshape(part.shape)

        return replace(self, codes=self.codes.on_rows(reversed_rows))

    def as_stack(self, position: int) -> "Quantized | None":
        """One of several axes of the rows read as a stack."""
        axis, n = self.layout.axes[position], len(self.layout.stack)
        sizes = self.layout.sizes(axis.kind)
        if axis.kind != self.rows or len(sizes) < 2 or self._runs_on or self._turns(axis.kind):
            return None
        place = self.layout.positions(axis.kind).index(position)

        def stacked(part: Array) -> Array:
            apart = part.reshape(*part.shape[:-2], *sizes, part.shape[-1])
            apart = jnp.moveaxis(apart, n + place, n)
            return apart.reshape(*apart.shape[: n + 1], -1, part.shape[-1])

        layout = self.layout.drop(position).with_stack(position, axis.size, n)
        return replace(self, codes=self.codes.on_rows(stacked), layout=layout)

    def on_base(self, fn: Callable[[Any], Any]) -> "Quantized":
        """What `fn` makes of the weight itself: there is no other base."""
        return fn(self)

    def part_specs(self, spec: PartitionSpec) -> "Quantized | None":
        """Codes and scales divided as the weight is; None where groups run on over what is divided."""
        full = (*spec, *(None,) * (self.ndim - len(spec)))
        stack = [full[p] for p in self.layout.positions("s")]
        divided = {}
        for side in ("i", "o"):
            first, *others = (full[p] for p in self.layout.positions(side))
            if any(others) or ((self._runs_on or self._turns(side)) and first is not None):
                return None
            divided[side] = first
        row, along = (divided["o"], divided["i"]) if self.rows == "o" else (divided["i"], divided["o"])
        return replace(self, codes=self.codes.specs(stack, row, along))

    def divided_with(self, activations: Sequence[tuple[Sequence[int], PartitionSpec]]) -> "Quantized":
        """With scales that are floats: codes of scales run on over all rows."""
        return replace(self, codes=self.codes.with_plain_scales())

    def gather_features(
        self, position: int, mesh_axes: tuple[str, ...], fn: Callable[[Array, int], Array], size: int
    ) -> "Quantized | None":
        """The weight with its rows, or whole groups of each, gathered; see `Views.gather_features`."""
        axis = self.layout.axes[position]
        if axis.kind not in "io" or axis.place != 0 or self._runs_on or self._turns(axis.kind):
            return None
        sizes = list(self.shape)
        sizes[position] = size
        at = 2 if axis.kind == self.rows else 1
        if at == 1 and self.codes.num_groups == 1:
            return None  # a scale for the whole row is no shard of one
        codes = self.codes.on_rows(lambda part: fn(part, part.ndim - at))
        return replace(self, codes=codes).relabeled(lambda layout: layout.resized(sizes))

    def relabeled(self, fn: Callable[[Layout], Layout]) -> "Quantized":
        """The same codes under another layout, whose width they have.

        Raises:
            PeftError: they are no whole groups and bytes of it.
        """
        layout = fn(self.layout)
        n, m = layout.matrix
        width = n * m if self._runs_on else n if self.rows == "o" else m
        return replace(self, layout=layout, codes=self.codes.of_width(width))

    def _turns(self, kind: str) -> bool:
        """Whether axes of that kind are rotated as a whole: a part of them is none of the codes."""
        return self.rotates and kind == "i"

    @property
    def _runs_on(self) -> bool:
        n, m = self.layout.matrix
        return self.codes.width != (n if self.rows == "o" else m)


def quantize(
    w: Array,
    layout: Layout,
    form: Format,
    *,
    rows: Side = "o",
    block: int | None = None,
    grid: Grid | None = None,
) -> Quantized:
    """An array as a quantized weight, the matrices of its stack one after the other.

    Args:
        w: any floating dtype.
        layout: of its axes.
        form: how it is coded.
        rows: which side the rows of the codes are: of a lookup table its inputs.
        block: how many numbers are coded at a time, as in `encode`.
        grid: scales and zero points `[*stack, rows, groups]`, as in `encode`.
    """
    matrices = to_canonical(w, layout)
    matrices = matrices.swapaxes(-1, -2) if rows == "o" else matrices
    if form.rotate:
        matrices = whole(matrices)
    shape = matrices.shape[-2:]
    if form.runs_on and matrices.shape[-1] % (form.group or 1):
        if sharding := explicit_sharding(matrices):
            # Groups that run on from row to row lie on one device.
            one_device = PartitionSpec(*sharding.spec[: len(layout.stack)], None, None)
            matrices = jax.sharding.reshard(matrices, NamedSharding(sharding.mesh, one_device))
        matrices = matrices.reshape(*layout.stack, 1, -1)
    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[-2:]), (matrices, grid))

    def coded_matrix(one: tuple[Array, Grid | None]) -> GroupCodes:
        matrix, grid = one
        if form.rotate:
            turned = _rotated_inputs(matrix.reshape(shape).astype(jnp.float32), rows)
            matrix = turned.reshape(matrix.shape)
        return encode(matrix, form, dtype=w.dtype, block=block, grid=grid)

    # All of a stack at once would take several float32 arrays of its size.
    codes = lax.map(coded_matrix, flat)
    codes = jax.tree.map(lambda part: part.reshape(*layout.stack, *part.shape[1:]), codes)
    return Quantized(codes, layout, w.dtype, rows)


def _rotated_inputs(matrices: Array, rows: Side) -> Array:
    """Matrices `[*stack, rows, width]` with their inputs rotated."""
    if rows == "o":
        return rotated(matrices)
    return rotated(matrices.swapaxes(-1, -2)).swapaxes(-1, -2)
