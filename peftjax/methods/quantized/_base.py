"""A base whose weights are codes: what the rewrites of this folder share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.naming import is_embedding
from peftjax.core.tree import Targets
from peftjax.quantize.groups import Format
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.layout import Layout, Side, layout_of
from peftjax.weights.quantized import Quantized, quantize
from peftjax.weights.rounded import Rounded


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """What all of them take.

    Attributes:
        targets: which weights are coded, as in `lora`; 'all-linear' leaves embeddings, convolutions and the
            head as they are.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern, a letter per axis: 's' stack, 'i' input, 'o' output.
    """

    targets: Targets = "all-linear"
    exclude: Targets | None = None
    layouts: Mapping[str, str] | None = None


def quantized_base(name: str, form: Format, options: BaseOptions) -> Transform:
    """A method that codes the base's weights and trains nothing.

    Args:
        name: the method's name.
        form: how they are coded.
        options: which of them.
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        return Frozen(quantized_params(name, form, options, params)[0]), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return frozen.params

    return Transform(name, {}, init, apply)


def rounded_base(name: str, form: Format, options: BaseOptions) -> Transform:
    """A method that trains the targeted weights, or what earlier methods train in them, rounded in each step.

    Args:
        name: the method's name.
        form: how they are coded.
        options: which of them.
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        leaves = tree.named_leaves(params)
        paths = tree.select(params, options.targets, caller=name, exclude=options.exclude)
        tree.require_patterns_used(name, options.layouts, paths)
        for path in paths:
            if isinstance(leaves[path], Quantized):
                raise PeftError(
                    f"{name}: {path!r} is a Quantized of an earlier method, and rounded already; put {name} "
                    "in that method's place"
                )
        layouts = tuple((path, layout_of(path, leaves, options.layouts)) for path in paths)
        taken, rest = tree.partition(params, [p for p in paths if not isinstance(leaves[p], Weight)])
        return Frozen(rest, plan=layouts), taken

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        params = tree.join(frozen.params, trainable)
        leaves = tree.named_leaves(params)
        rounded = {
            path: Rounded(leaves[path], layout, form, coded_side(layout), leaves[path].dtype)
            for path, layout in frozen.plan
        }
        return tree.replace(params, rounded)

    return Transform(name, {}, init, apply)


def quantized_params(
    name: str, form: Format, options: BaseOptions, params: Params, *, take_codes: bool = False
) -> tuple[Params, list[str]]:
    """The parameters with codes for the targeted ones, and which these are.

    Args:
        name: the method's name.
        form: how they are coded.
        options: which of them.
        params: the parameters.
        take_codes: whether a target that is codes already stays as it is.

    Raises:
        PeftError: nothing, or only part of a list, is matched; a target is no plain array.
    """
    leaves = tree.named_leaves(params)
    paths = tree.select(params, options.targets, caller=name, exclude=options.exclude)
    tree.require_patterns_used(name, options.layouts, paths)
    coded = {}
    for path in paths:
        if take_codes and isinstance(leaves[path], Quantized):
            continue
        if isinstance(leaves[path], Weight):
            raise PeftError(
                f"{name}: {path!r} is a {type(leaves[path]).__name__} of an earlier method; codes are made "
                f"of plain arrays, so put {name} first"
            )
        layout = layout_of(path, leaves, options.layouts)
        coded[path] = coded_weight(leaves[path], layout, form)
    return tree.replace(params, coded), paths


def coded_side(layout: Layout) -> Side:
    """Which side the rows of a weight's codes are: of a lookup table its inputs."""
    return "i" if is_embedding(layout.name) else "o"


def coded_weight(w: Array, layout: Layout, form: Format, *, rows: Side | None = None) -> Quantized:
    """A weight as codes, on the devices on which it lies.

    Args:
        w: the array, placed or traced.
        layout: of its axes; the rows of a lookup table are coded each for itself.
        form: how.
        rows: which side the rows of the codes are, where not that of `coded_side`.
    """
    encode = partial(quantize, layout=layout, form=form, rows=rows or coded_side(layout))
    if isinstance(w, jax.core.Tracer) or not isinstance(getattr(w, "sharding", None), NamedSharding):
        return jax.jit(encode)(w)
    shapes = jax.eval_shape(encode, w)
    return jax.jit(encode, out_shardings=_shardings(shapes, w.sharding))(w)


def placed_as(coded: Quantized, w: Array) -> Quantized:
    """Codes on the devices on which their weight lies."""
    if isinstance(w, jax.core.Tracer) or not isinstance(getattr(w, "sharding", None), NamedSharding):
        return coded
    return jax.device_put(coded, _shardings(coded, w.sharding))


def _shardings(shapes: Quantized, of_weight: NamedSharding) -> Any:
    """Where codes and scales go beside the devices of their weight; whole where they do not divide."""
    specs = shapes.part_specs(of_weight.spec)

    def place(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        mesh = of_weight.mesh
        parts = []
        for size, axes in zip(leaf.shape, (*spec, *(None,) * leaf.ndim)):
            names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            count = 1
            for one in names:
                count *= mesh.shape[one]
            parts.append(axes if size % count == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*parts))

    if specs is None:
        return jax.tree.map(lambda leaf: place(leaf, PartitionSpec()), shapes)
    own = jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [place(leaf, spec) for leaf, spec in zip(leaves, own, strict=True)])
