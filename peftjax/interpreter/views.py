"""Views of a weight, such as transposes and slices: the result is a structured weight too.

Single rows, and rows that the model adds to activations, are plain arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core import compat
from peftjax.interpreter.arithmetic import negated, plus, summed, times
from peftjax.interpreter.lookups import as_activation, is_table, look_up, only_member
from peftjax.weights.base import Weight
from peftjax.weights.coding import code_shardings
from peftjax.weights.quantized import Quantized
from peftjax.weights.views import reshape, slice_features, transpose


def _transpose(eqn: Any, operands: list[Any]) -> Weight | None:
    return transpose(operands[0], eqn.params["permutation"])


def reordered(eqn: Any, operands: list[Any]) -> Any:
    """The operand of a `reshape`, which may have another order of its axes."""
    order = eqn.params.get("dimensions")
    return operands[0] if order is None else transpose(operands[0], order)


def _reshape(eqn: Any, operands: list[Any]) -> Weight | None:
    weight = reordered(eqn, operands)
    return None if weight is None else reshape(weight, eqn.params["new_sizes"])


def _broadcast_in_dim(eqn: Any, operands: list[Any]) -> Any:
    shape = eqn.params["shape"]
    if math.prod(shape) == math.prod(operands[0].shape):
        return reshape(operands[0], shape)
    rows = as_activation(operands[0])
    return None if rows is None else compat.bind(eqn, [rows, *operands[1:]])


def _squeeze(eqn: Any, operands: list[Any]) -> Any:
    weight = operands[0]
    for position in sorted(eqn.params["dimensions"], reverse=True):
        if not isinstance(weight, Weight):
            weight = jnp.squeeze(weight, position)
        elif weight.layout.axes[position].kind == "s":
            weight = weight.map_stack(position, lambda part, axis: jnp.squeeze(part, axis), None)
        else:
            view = reshape(weight, weight.shape[:position] + weight.shape[position + 1 :])
            weight = only_member(weight, position) if view is None else view
        if weight is None:
            return None
    return weight


def _rev(eqn: Any, operands: list[Any]) -> Weight | None:
    weight = operands[0]
    for position in eqn.params["dimensions"]:
        weight = None if weight is None else weight.reverse(position)
    return weight


def _convert(eqn: Any, operands: list[Any]) -> Weight | None:
    dtype = eqn.params["new_dtype"]
    return operands[0].cast(dtype) if jnp.issubdtype(dtype, jnp.floating) else None


def _slice(eqn: Any, operands: list[Any]) -> Any:
    weight = operands[0]
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim
    for position, cut in enumerate(map(range, starts, limits, strides)):
        if not isinstance(weight, Weight):
            weight = slice_features(weight, position, cut)
            continue
        view = _cut(weight, position, cut)
        if view is None and len(cut) == 1 and is_table(weight):
            view = look_up(weight, position, jnp.array([cut.start]))
        if view is None:
            return None
        weight = view
    return weight


def _cut(weight: Weight, position: int, cut: range) -> Weight | None:
    """`weight[start:stop:step]` along one axis."""
    if cut == range(weight.shape[position]):
        return weight
    if weight.layout.axes[position].kind == "s":
        return weight.map_stack(position, lambda part, axis: slice_features(part, axis, cut), len(cut))
    return weight.slice_features(position, cut)


def _split(eqn: Any, operands: list[Any]) -> list[Weight] | None:
    weight, axis, start = operands[0], eqn.params["axis"], 0
    parts: list[Weight] = []
    for size in eqn.params["sizes"]:
        part = _cut(weight, axis, range(start, start + size))
        if part is None:
            return None
        parts.append(part)
        start += size
    return parts


def _dynamic_slice(eqn: Any, operands: list[Any]) -> Any:
    weight, *starts = operands
    if not isinstance(weight, Weight):
        return None
    cuts = [
        (position, start, size)
        for position, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"]))
        if size != weight.shape[position]
    ]
    rows = [cut for cut in cuts if weight.layout.axes[cut[0]].kind in ("i", "o")]
    for position, start, size in cuts:
        if weight is None or (position, start, size) in rows:
            continue
        weight = weight.map_stack(
            position,
            lambda part, axis, cut=(start, size): lax.dynamic_slice_in_dim(part, *cut, axis=axis),
            size,
        )
    if weight is None or not rows:
        return weight
    if len(rows) > 1 or not is_table(weight):
        return None
    position, start, size = rows[0]
    return look_up(weight, position, jnp.reshape(start, (1,)), size)


def _unstack(eqn: Any, operands: list[Any]) -> list[Weight] | None:
    # jax 0.11 and newer: iterating over an array.
    weight, axis = operands[0], eqn.params["axis"]
    if weight.layout.axes[axis].kind != "s":
        return None
    return [
        weight.map_stack(axis, lambda part, at, n=n: lax.index_in_dim(part, n, at, keepdims=False), None)
        for n in range(weight.shape[axis])
    ]


def _all_gather(eqn: Any, operands: list[Any]) -> Weight | None:
    # A weight that is divided over devices and made whole before its use: so are its parts.
    weight, position = operands[0], eqn.params["all_gather_dimension"]
    names, groups = eqn.params["axis_name"], eqn.params["axis_index_groups"]
    if not eqn.params["tiled"]:
        return None

    def gathered(part: Any, axis: int) -> Any:
        return lax.all_gather(part, names, axis=axis, tiled=True, axis_index_groups=groups)

    (out,) = eqn.outvars
    size, kind = out.aval.shape[position], weight.layout.axes[position].kind
    if kind == "s":
        return weight.map_stack(position, gathered, size)
    mesh_axes = names if isinstance(names, tuple) else (names,)
    return weight.gather_features(position, mesh_axes, gathered, size) if groups is None else None


def _each_part(eqn: Any, operands: list[Any]) -> Weight:
    return operands[0].elementwise(lambda part: compat.bind(eqn, [part])[0])


def _vary(eqn: Any, operands: list[Any]) -> Weight:
    # A part that is divided where the weight is not, such as rows that follow the batch, varies already.
    axes = compat.newly_varying(eqn)
    if not axes:
        return _each_part(eqn, operands)
    return operands[0].elementwise(lambda part: compat.made_to_vary(part, axes))


def _constrain(eqn: Any, operands: list[Any]) -> Weight:
    # The constraint speaks of the logical axes: it holds for the base; the factors follow from use.
    weight, target = operands[0], eqn.params["sharding"]

    def constrained(base: Any) -> Any:
        if not isinstance(base, Weight):
            return compat.bind(eqn, [base])[0]
        if not (isinstance(base, Quantized) and isinstance(target, NamedSharding)):
            return base
        with compat.context_of(eqn):
            return jax.tree.map(lax.with_sharding_constraint, base, code_shardings(base, target))

    return weight.on_base(constrained)


def _reshard(eqn: Any, operands: list[Any]) -> Weight | None:
    # Each part goes where its part of the whole sharding says.
    weight, target = operands[0], eqn.params["dst_sharding"]
    specs = weight.part_specs(target.spec)
    if specs is None:
        return None
    parts, tree = jax.tree.flatten(weight)
    own = jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    moved = [
        compat.bind(eqn, [part], dst_sharding=NamedSharding(target.mesh, _of_rank(spec, part.ndim)))[0]
        for part, spec in zip(parts, own, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def _of_rank(spec: PartitionSpec, rank: int) -> PartitionSpec:
    return PartitionSpec(*spec, *(None,) * (rank - len(spec)))


VIEWS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "rev": _rev,
    "convert_element_type": _convert,
    "slice": _slice,
    "split": _split,
    "add": plus,
    "sub": plus,
    "mul": times,
    "div": times,
    "neg": negated,
    "reduce_sum": summed,
    "dynamic_slice": _dynamic_slice,
    "unstack": _unstack,
    "all_gather": _all_gather,
    "sharding_constraint": _constrain,
    "reshard": _reshard,
    "stop_gradient": _each_part,
    "optimization_barrier": _each_part,
    "copy": _each_part,
    "copy_p": _each_part,
    "name": _each_part,
    "pvary": _vary,
    "pcast": _vary,
}
