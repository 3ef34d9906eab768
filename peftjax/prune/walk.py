"""The axes of weights, followed through the jaxpr of a function.

Every axis of a weight is followed through the program. What an equation makes of it decides:

    x·w, conv(x, w)       the two axes that meet are one, and the weight reads there
    elementwise           axes in the same place are one: biases, scales, gates, residual sums
    reshape, transpose    an axis may become part of one, or several: heads
    a loop over layers    each layer has units of its own, unless the loop carries them
    anything else         what it does not act on alone is fixed: norms, softmax, sums, positions, constants
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peftjax.core import compat
from peftjax.prune.dimensions import Axis, Dimensions, Scope

ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not",
    "optimization_barrier", "or", "pcast", "pow", "pvary", "reduce_precision", "rem", "reshard",
    "round", "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
))  # fmt: skip
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax")
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
         "custom_vjp_call")  # fmt: skip


@dataclass(frozen=True)
class Followed:
    """The axes of an array; of a view of a weight also which of the weight's axes they are.

    Attributes:
        axes: of the array.
        path: of the weight.
        origins: for each axis those of the weight that are in it.
        loops: those over the weight's first axes, from the outermost in.
    """

    axes: tuple[Axis, ...]
    path: str | None = None
    origins: tuple[frozenset[int], ...] = ()
    loops: Scope = ()

    def with_axes(self, axes: Sequence[Axis], origins: Sequence[frozenset[int]]) -> "Followed":
        """Another view of the weight; of an activation, another one."""
        if self.path is None:
            return Followed(tuple(axes))
        return replace(self, axes=tuple(axes), origins=tuple(origins))


@dataclass
class Walk:
    """What is known of a program so far."""

    dimensions: Dimensions = field(default_factory=Dimensions)
    reads: set[tuple[str, int]] = field(default_factory=set)
    filters: set[str] = field(default_factory=set)
    loops: dict[str, Scope] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def of_shape(self, shape: Sequence[int], *, fixed: bool = False) -> Followed:
        """An array that nothing is known of."""
        return Followed(tuple(self.dimensions.axis(size, fixed=fixed) for size in shape))

    def fix(self, *values: Followed) -> None:
        """Let no axis of these be cut."""
        for value in values:
            for axis in value.axes:
                self.dimensions.fix(axis)

    def run(self, jaxpr: Any, values: Sequence[Followed], scope: Scope) -> list[Followed]:
        """The outputs of a jaxpr for its constants and arguments."""
        env: dict[Any, Followed] = dict(zip(compat.inputs_of(jaxpr), values, strict=True))

        def read(atom: Any) -> Followed:
            if compat.is_literal(atom):
                return self.of_shape(np.shape(atom.val), fixed=True)
            return env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            results = self.equation(eqn, operands, scope)
            env.update(zip(eqn.outvars, results, strict=True))
            if eqn.primitive.name in (*CALLS, "scan", "cond") or all(
                v.path is not None for v in operands if v.axes
            ):
                continue
            for value in (*operands, *results):
                for axis in value.axes:
                    self.dimensions.touch(axis, scope)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Followed], scope: Scope) -> list[Followed]:
        """The results of one equation."""
        name = eqn.primitive.name
        if name in CALLS:
            jaxpr, consts = compat.open_jaxpr(eqn.params.get("call_jaxpr") or eqn.params["jaxpr"])
            constants = [self.of_shape(np.shape(value), fixed=True) for value in consts]
            return self.run(jaxpr, [*constants, *operands], scope)
        if name == "scan":
            return self._scan(eqn, operands, scope)
        if name == "cond":
            return self._cond(eqn, operands, scope)
        shapes = [variable.aval.shape for variable in eqn.outvars]
        if name in ELEMENTWISE:
            return self._elementwise(operands, shapes)
        if name == "split":
            return [_cut(self, eqn.params, operands, shape) for shape in shapes]
        if (rule := _RULES.get(name)) is not None:
            return [rule(self, eqn.params, operands, shapes[0])]
        self.fix(*operands)
        return [self.of_shape(shape, fixed=True) for shape in shapes]

    def _elementwise(self, operands: list[Followed], shapes: Sequence[tuple[int, ...]]) -> list[Followed]:
        """The first operand of full shape, joined with the others."""
        if len(operands) == len(shapes):  # one for one, such as a barrier
            return list(operands)
        (shape,) = shapes
        paths = {value.path for value in operands if value.axes}
        first = next((value for value in operands if len(value.axes) == len(shape)), None)
        if first is None:
            return [self.of_shape(shape)]
        axes = []
        for position in range(len(shape)):
            own = [value.axes[position] for value in operands if len(value.axes) == len(shape)]
            own = [axis for axis in own if axis]
            for other in own[1:]:
                self.dimensions.join(own[0], other)
            axes.append(own[0] if own else ())
        if len(paths) == 1 and first.path is not None:
            return [replace(first, axes=tuple(axes))]
        return [Followed(tuple(axes))]

    def _scan(self, eqn: Any, operands: list[Followed], scope: Scope) -> list[Followed]:
        consts, carry, xs = compat.split_scan(eqn.params, operands)
        number = len(self.lengths)
        self.lengths.append(eqn.params["length"])
        inner = (*scope, number)
        sliced = []
        for value in xs:
            self.dimensions.fix(value.axes[0])
            one = value.with_axes(value.axes[1:], value.origins[1:])
            if value.path is not None and value.origins[0] == {len(value.loops)}:
                one = replace(one, loops=(*value.loops, number))
                self.loops[value.path] = one.loops
            elif value.path is not None:
                self.fix(one)
            sliced.append(one)
        for value in (*consts, *carry):
            for axis in value.axes:
                self.dimensions.touch(axis, scope)
        jaxpr, constants = compat.open_jaxpr(eqn.params["jaxpr"])
        held = [self.of_shape(np.shape(value), fixed=True) for value in constants]
        out = self.run(jaxpr, [*held, *consts, *carry, *sliced], inner)
        for before, after in zip(carry, out):
            for one, other in zip(before.axes, after.axes):
                self.dimensions.join(one, other)
                self.dimensions.touch(one, scope)
        stacked = []
        for value in out[len(carry) :]:
            for axis in value.axes:
                self.dimensions.touch(axis, scope)
            stacked.append(Followed((self.dimensions.axis(eqn.params["length"], fixed=True), *value.axes)))
        return [*out[: len(carry)], *stacked]

    def _cond(self, eqn: Any, operands: list[Followed], scope: Scope) -> list[Followed]:
        found: list[Followed] = []
        for branch in eqn.params["branches"]:
            jaxpr, constants = compat.open_jaxpr(branch)
            held = [self.of_shape(np.shape(value), fixed=True) for value in constants]
            out = self.run(jaxpr, [*held, *operands[1:]], scope)
            found = found or [Followed(value.axes) for value in out]
            for one, other in zip(found, out):
                for left, right in zip(one.axes, other.axes):
                    self.dimensions.join(left, right)
        return found

    def contracted(self, one: Followed, other: Followed, places: Sequence[tuple[int, int]]) -> None:
        """Join what meets in a product, and note which weight reads there; two activations fix theirs."""
        for left, right in places:
            self.dimensions.join(one.axes[left], other.axes[right])
            weights = [
                (value, place) for value, place in ((one, left), (other, right)) if value.path is not None
            ]
            if len(weights) != 1:
                self.dimensions.fix(one.axes[left])
            for value, place in weights:
                self.reads |= {(str(value.path), origin) for origin in value.origins[place]}


def _dot_general(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    one, other = operands
    walk.contracted(one, other, list(zip(left, right)))
    batch = []
    for first, second in zip(left_batch, right_batch):
        walk.dimensions.join(one.axes[first], other.axes[second])
        batch.append(one.axes[first])
    free = [axis for n, axis in enumerate(one.axes) if n not in (*left, *left_batch)]
    free += [axis for n, axis in enumerate(other.axes) if n not in (*right, *right_batch)]
    return Followed((*batch, *free))


def _convolution(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    x, kernel = operands
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (x_batch, x_channel, *x_window), (outputs, inputs, *window) = numbers.lhs_spec, numbers.rhs_spec
    for value, places in ((x, x_window), (kernel, window)):
        for place in places:
            walk.dimensions.fix(value.axes[place])
    if groups == 1:
        walk.contracted(x, kernel, [(x_channel, inputs)])
    elif _size(walk, x.axes[x_channel]) == groups == _size(walk, kernel.axes[outputs]):
        walk.dimensions.join(x.axes[x_channel], kernel.axes[outputs])  # each channel by itself
    else:
        walk.fix(x, kernel)
    if params["batch_group_count"] != 1:
        walk.fix(x, kernel)
    if kernel.path is not None:
        walk.filters.add(kernel.path)
    out_batch, out_channel, *_ = numbers.out_spec
    axes = [walk.dimensions.axis(size, fixed=True) for size in shape]
    axes[out_batch], axes[out_channel] = x.axes[x_batch], kernel.axes[outputs]
    return Followed(tuple(axes))


def _size(walk: Walk, axis: Axis) -> int:
    return int(np.prod([walk.dimensions.sizes[part] for part in walk.dimensions.parts(axis)], initial=1))


def _broadcast(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    value = operands[0]
    axes = [walk.dimensions.axis(size) for size in shape]
    origins: list[frozenset[int]] = [frozenset() for _ in shape]
    for place, axis in enumerate(params["broadcast_dimensions"]):
        if value.axes[place]:
            axes[axis] = value.axes[place]
            origins[axis] = value.origins[place] if value.path is not None else frozenset()
    return value.with_axes(axes, origins)


def _reshape(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    value = operands[0]
    axes = None if params.get("dimensions") is not None else walk.dimensions.reshaped(value.axes, shape)
    if axes is None:
        walk.fix(value)
        return walk.of_shape(shape, fixed=True)
    if value.path is None:
        return Followed(tuple(axes))
    of_part: dict[int, frozenset[int]] = {}
    for axis, origin in zip(value.axes, value.origins):
        for part in walk.dimensions.parts(axis):
            of_part[part] = of_part.get(part, frozenset()) | origin
    origins = [
        frozenset().union(*(of_part.get(part, frozenset()) for part in walk.dimensions.parts(axis)))
        for axis in axes
    ]
    return value.with_axes(axes, origins)


def _transpose(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    return _picked(operands[0], params["permutation"])


def _squeeze(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    value = operands[0]
    return _picked(value, [n for n in range(len(value.axes)) if n not in params["dimensions"]])


def _reduced(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    value = operands[0]
    for axis in params["axes"]:
        walk.dimensions.fix(value.axes[axis])
    return Followed(tuple(axis for n, axis in enumerate(value.axes) if n not in params["axes"]))


def _picked(value: Followed, places: Sequence[int]) -> Followed:
    origins = [value.origins[n] for n in places] if value.path is not None else []
    return value.with_axes([value.axes[n] for n in places], origins)


def _cut(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    """Slices and paddings: the axes that change are fixed, before and after."""
    value = operands[0]
    axes = []
    for axis, size in zip(value.axes, shape):
        if _size(walk, axis) == size:
            axes.append(axis)
            continue
        walk.dimensions.fix(axis)
        axes.append(walk.dimensions.axis(size, fixed=True))
    return value.with_axes(axes, value.origins)


def _concatenated(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    axes = list(operands[0].axes)
    for value in operands:
        walk.dimensions.fix(value.axes[params["dimension"]])
        for n, axis in enumerate(value.axes):
            if n != params["dimension"]:
                walk.dimensions.join(axes[n], axis)
    axes[params["dimension"]] = walk.dimensions.axis(shape[params["dimension"]], fixed=True)
    return Followed(tuple(axes))


def _gather(walk: Walk, params: Any, operands: list[Followed], shape: tuple[int, ...]) -> Followed:
    """Rows of a table: what is taken whole goes on, what is looked up is fixed."""
    value, numbers = operands[0], params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = [n for n in range(len(value.axes)) if n not in gone]
    axes = [walk.dimensions.axis(size, fixed=True) for size in shape]
    for n, axis in enumerate(value.axes):
        whole = n in left and params["slice_sizes"][n] == _size(walk, axis)
        if whole and axis:
            axes[numbers.offset_dims[left.index(n)]] = axis
        else:
            walk.dimensions.fix(axis)
    return Followed(tuple(axes))


_Rule = Callable[[Walk, Any, list[Followed], tuple[int, ...]], Followed]
_RULES: dict[str, _Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _cut,
    "dynamic_slice": _cut,
    "pad": _cut,
    "concatenate": _concatenated,
    "gather": _gather,
    **dict.fromkeys(REDUCTIONS, _reduced),
}
