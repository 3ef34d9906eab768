"""A base whose weights are codes: what the rewrites of this folder share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, require_patterns_used, select
from peftjax.quantize.formats import describe
from peftjax.quantize.groups import Format
from peftjax.transform.around import Around, require_given
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight
from peftjax.weights.coding import Coding, rows_of
from peftjax.weights.layout import layout_of
from peftjax.weights.quantized import Quantized
from peftjax.weights.rounded import Rounded, near_a_boundary


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

    def codings_of(params: Params) -> dict[str, Coding]:
        return codings(name, form, options, params)[1]

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        return Frozen(quantized_params(name, form, options, params)[0]), {}

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        return frozen.params

    return Transform(name, {}, init, apply, codings=codings_of)


def rounded_base(name: str, form: Format, options: BaseOptions, *, anneal: float | None = None) -> Transform:
    """A method that trains the targeted weights, or what earlier methods train in them, rounded in each step.

    Args:
        name: the method's name.
        form: how they are coded.
        options: which of them.
        anneal: how far from the middle of two codes a weight is moved by a step, as a share of the scale; by
            default all are moved.
    """

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        leaves = tree.named_leaves(params)
        paths = select(params, options.targets, caller=name, exclude=options.exclude)
        require_patterns_used(name, options.layouts, paths)
        for path in paths:
            if isinstance(leaves[path], Quantized):
                raise PeftError(
                    f"{name}: {path!r} is a Quantized of an earlier method, and rounded already; put {name} "
                    "in that method's place"
                )
        layouts = tuple((path, layout_of(path, leaves, options.layouts)) for path in paths)
        adapted = [path for path in paths if isinstance(leaves[path], Weight)]
        if adapted and anneal is not None:
            raise PeftError(
                f"{name}: anneal holds weights that {name} itself trains, and {adapted[0]!r} is a "
                f"{type(leaves[adapted[0]]).__name__} of an earlier method; leave one of the two out"
            )
        taken, rest = tree.partition(params, [path for path in paths if path not in adapted])
        return Frozen(rest, plan=layouts), taken

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
        params = tree.join(frozen.params, trainable)
        leaves = tree.named_leaves(params)
        rounded = {
            path: Rounded(leaves[path], layout, form, rows_of(layout), leaves[path].dtype)
            for path, layout in frozen.plan
        }
        return tree.replace(params, rounded)

    around = None if anneal is None else _annealed(name, form, anneal)
    return Transform(name, {}, init, apply, around=around)


def _annealed(name: str, form: Format, share: float) -> Around:
    """What moves only the weights that are close to two codes, those before the step deciding.

    The others' gradients are zero, and so, whatever the optimizer's moments and decay would do, are their
    updates: a negative zero, which leaves each number as it is, zeros of either sign too.
    """

    def where_near(otherwise: float) -> optax.GradientTransformationExtraArgs:
        def update(
            updates: Any, state: Any, params: Any = None, *, frozen: Frozen | None = None, **extra: Any
        ) -> tuple[Any, Any]:
            layouts = dict(require_given(name, params, frozen).plan)

            def moved(path: str, value: Array) -> Array:
                near = near_a_boundary(params[path], layouts[path], form, share)
                return jnp.where(near, value, jnp.asarray(otherwise, value.dtype))

            return {path: moved(path, value) for path, value in updates.items()}, state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    return Around(gradients=where_near(0.0), updates=where_near(-0.0))


def quantized_params(
    name: str, form: Format, options: BaseOptions, params: Params, *, take_codes: bool = False
) -> tuple[Params, list[str]]:
    """The parameters with codes for the targeted ones, and which these are.

    Args:
        name: the method's name.
        form: how they are coded.
        options: which of them.
        params: the parameters.
        take_codes: whether a target that is codes of another format stays as it is.

    Raises:
        PeftError: nothing, or only part of a list, is matched; a target is no plain array, and no codes that
            stay.
    """
    leaves = tree.named_leaves(params)
    paths, found = codings(name, form, options, params, take_codes=take_codes)
    return tree.replace(params, {path: coding(leaves[path]) for path, coding in found.items()}), paths


def codings(
    name: str, form: Format, options: BaseOptions, params: Params, *, take_codes: bool = False
) -> tuple[list[str], dict[str, Coding]]:
    """The paths of the targeted parameters, and how those that are no codes yet are coded.

    The arguments and errors are those of `quantized_params`; `params` may be shapes.
    """
    leaves = tree.named_leaves(params)
    paths = select(params, options.targets, caller=name, exclude=options.exclude)
    require_patterns_used(name, options.layouts, paths)
    found = {}
    for path in paths:
        leaf = leaves[path]
        if isinstance(leaf, Quantized):
            if not take_codes:
                _require_format(name, path, leaf, form)
            continue
        if isinstance(leaf, Weight):
            raise PeftError(
                f"{name}: {path!r} is a {type(leaf).__name__} of an earlier method; codes are made "
                f"of plain arrays, so put {name} first"
            )
        found[path] = Coding(layout_of(path, leaves, options.layouts), form)
    return paths, found


def _require_format(name: str, path: str, leaf: Quantized, form: Format) -> None:
    if leaf.codes.format != form:
        raise PeftError(
            f"{name}: {path!r} is coded already, as {describe(leaf.codes.format)}, and {name} would make "
            f"{describe(form)} of it: leave {name} out to train on the codes as they are, name the path in "
            "`exclude`, or load the checkpoint of floats"
        )
