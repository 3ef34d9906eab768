"""Operations of peftjax that are one equation in a jaxpr: their lowerings, derivatives and batching."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from peftjax.core import compat

Pull = Callable[..., Sequence[Any]]
Body = Callable[..., Sequence[Any]]
OnWeights = Callable[..., Sequence[Any] | None]


class _Operation(jex.Primitive):
    """A primitive of ours: what it runs by platform (None: others), and what it is on structured weights."""

    multiple_results = True

    def __init__(
        self, name: str, bodies: Mapping[str | None, Body], on_weights: OnWeights | None = None
    ) -> None:
        super().__init__(name)
        self.bodies, self.on_weights = dict(bodies), on_weights


def by_platform(
    name: str,
    plain: Body,
    kernels: Mapping[str, Body],
    *,
    always: bool = False,
    counted_as_plain: bool = False,
    batched: Callable[..., tuple | None] | None = None,
) -> Callable[..., list[Any]]:
    """A function whose body is chosen when the program around it is lowered for a platform.

    Each body maps arrays and static keywords to a list of arrays of the same types. `kernels[platform]`
    is taken in a program for one device and in the device's own code of a `shard_map`; `plain`, which
    XLA may partition, in every other, in one for `jax.export` and on other platforms; `always` takes the
    kernel in every program for its platform. With `counted_as_plain` the FLOPs of a kernel, of which the
    traced program does not tell, are those of `plain`. All arrays lead with axes of a stack: `vmap` adds one,
    where `batched(arrays, axes, **static)` does not give `(outputs, axes)` that take less. Derivatives are
    those of `plain`.
    """
    primitive = _Operation(name, {None: plain} if counted_as_plain else {None: plain, **kernels})
    compiled = lru_cache(maxsize=None)(lambda static: jax.jit(partial(primitive.bind, **dict(static))))
    primitive.def_impl(lambda *arrays, **static: compiled(tuple(sorted(static.items())))(*arrays))
    primitive.def_abstract_eval(lambda *avals, **static: _types(partial(plain, **static), avals))
    ad.primitive_jvps[primitive] = partial(_derivative_of_plain, primitive, plain)
    batching.primitive_batchers[primitive] = partial(_over_stack, primitive, batched)
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=True))
    for platform, kernel in kernels.items():
        mlir.register_lowering(primitive, partial(_lowered, plain, kernel, always), platform=platform)
    return primitive.bind


def one_equation(
    name: str,
    body: Body,
    differentiable: Callable[..., Body],
    mapped: Body,
    on_weights: OnWeights | None,
) -> Callable[..., list[Any]]:
    """A function of arrays and static keywords that is one equation in a jaxpr until it is differentiated.

    `body(*arrays, **static)` is what it runs. `differentiable(moving, arrays, **static)` gives the function,
    with a rule, that stands for it where those `arrays` for which `moving` is True have a tangent; it takes
    these alone. `mapped(arrays, axes, **static)` gives the outputs mapped over those axes, axis 0 of each.
    `on_weights(evaluator, eqn, operands)` is the equation in `peftjax.adapt`, where some operands are
    structured weights: its results, or None where one of them has no such form; by default the interpreter's
    own rule.
    """
    primitive = _Operation(name, {None: body}, on_weights)
    primitive.def_impl(body)
    primitive.def_abstract_eval(lambda *avals, **static: _types(partial(body, **static), avals))
    ad.primitive_jvps[primitive] = partial(_derivative, differentiable)
    batching.primitive_batchers[primitive] = partial(_batched, mapped)
    mlir.register_lowering(primitive, mlir.lower_fun(body, multiple_results=True))
    return primitive.bind


def transpose_of(pull: Pull, linear: Pull, residuals: Any, tangents: Any, outputs: Any) -> list[Any]:
    """The tangents of some outputs: what a linear map makes of tangents, given as the map's transpose.

    It is one equation, which reverse mode turns into `pull` and which keeps the residuals alone. Forward
    mode, and every higher derivative, runs the transpose of `linear`.

    Args:
        pull: `(residuals, *cotangents of the outputs) -> cotangents, one for each of the tangents`.
        linear: `pull`, or what of it is linear in the cotangents.
        residuals: arrays.
        tangents: floating-point arrays.
        outputs: the arrays whose tangents these are; not kept.
    """
    static = {"pull": pull, "linear": linear, "num_residuals": len(residuals)}
    types = tuple(jax.typeof(out) for out in outputs)
    return _transposed.bind(*residuals, *tangents, **static, types=types)


def body_for(primitive: Any, platform: str) -> Body | None:
    """What a primitive of `by_platform` runs, or counts as, on one device; None for any other primitive."""
    if not isinstance(primitive, _Operation):
        return None
    return primitive.bodies.get(platform, primitive.bodies[None])


def rule_on_weights(primitive: Any) -> OnWeights | None:
    """What `peftjax.adapt` makes of a primitive of `one_equation`; None for any other primitive."""
    return primitive.on_weights if isinstance(primitive, _Operation) else None


def _derivative_of_plain(
    primitive: Any, plain: Any, primals: Sequence[Any], tangents: Sequence[Any], **static: Any
) -> tuple[Any, Any]:
    moving = [type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents]
    some = jax.jvp(
        lambda *moved: plain(*_filled_in(primals, moving, moved), **static),
        tuple(v for v, m in zip(primals, moving) if m),
        tuple(t for t, m in zip(tangents, moving) if m),
    )[1]
    return primitive.bind(*primals, **static), [
        ad.Zero(jax.typeof(t)) if t.dtype == jax.dtypes.float0 else t for t in some
    ]


def _filled_in(values: Sequence[Any], moving: Sequence[bool], moved: Sequence[Any]) -> list[Any]:
    given = iter(moved)
    return [next(given) if moves else value for value, moves in zip(values, moving)]


def _push(*operands: Any, linear: Pull, num_residuals: int, types: Any, **_: Any) -> list[Any]:
    residuals, tangents = operands[:num_residuals], operands[num_residuals:]
    zeros = [_zeros(aval) for aval in types]
    # Linear as the map is, its transpose is its derivative anywhere.
    zeros, tangents = compat.varying_alike((zeros, list(tangents), list(residuals)))[:2]
    made, push = jax.vjp(lambda *cts: list(linear(list(residuals), *cts)), *zeros)
    return list(push([jax.numpy.asarray(t, m.dtype) for t, m in zip(tangents, made)]))


def _zeros(aval: Any) -> Any:
    sharding = getattr(aval, "sharding", None)
    zeros = jax.numpy.zeros(aval.shape, aval.dtype)
    explicit = sharding is not None and AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(zeros, sharding) if explicit else zeros


def _derivative_of_push(primals: Sequence[Any], tangents: Sequence[Any], **static: Any) -> tuple[Any, Any]:
    """Along the tangents the same map, along the residuals whatever its derivative is."""
    n = static["num_residuals"]
    out = _transposed.bind(*primals, **static)
    along = [jax.numpy.zeros_like(v) for v in out]
    if any(type(t) is not ad.Zero for t in tangents[n:]):
        moved = [ad.instantiate_zeros(t) for t in tangents[n:]]
        along = _transposed.bind(*primals[:n], *moved, **{**static, "pull": static["linear"]})
    moving = [type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents[:n]]
    if any(moving):
        of_residuals = jax.jvp(
            lambda *some: _push(*_filled_in(primals[:n], moving, some), *primals[n:], **static),
            tuple(v for v, m in zip(primals[:n], moving) if m),
            tuple(t for t, m in zip(tangents[:n], moving) if m),
        )[1]
        along = [a + b for a, b in zip(along, of_residuals)]
    return out, along


def _pull(cotangents: Sequence[Any], *operands: Any, pull: Pull, num_residuals: int, **_: Any) -> list[Any]:
    found = pull(list(operands[:num_residuals]), *map(ad.instantiate_zeros, cotangents))
    of_tangents = zip(operands[num_residuals:], found, strict=True)
    return [None] * num_residuals + [ct if ad.is_undefined_primal(t) else None for t, ct in of_tangents]


def _over_axis(operands: Sequence[Any], axes: Sequence[int | None], **static: Any) -> tuple[Any, Any]:
    """Mapped residuals stay where they are; every tangent gets the axis, so that each has a cotangent."""
    n, number = static["num_residuals"], len(static["types"])
    (size,) = {x.shape[axis] for x, axis in zip(operands, axes) if axis is not None}
    tangents = [
        jax.numpy.broadcast_to(t, (size, *t.shape)) if axis is None else jax.numpy.moveaxis(t, axis, 0)
        for t, axis in zip(operands[n:], axes[n:])
    ]

    def mapped(pull: Pull) -> Pull:
        return jax.vmap(pull, in_axes=(list(axes[:n]), *[0] * number), axis_size=size)

    static = {**static, "pull": mapped(static["pull"]), "linear": mapped(static["linear"])}
    types = [jax.ShapeDtypeStruct((size, *aval.shape), aval.dtype) for aval in static["types"]]
    static["types"] = tuple(_types(lambda *outs: list(outs), types))
    return _transposed.bind(*operands[:n], *tangents, **static), [0] * number


_transposed = _Operation("transposed", {None: _push})
_transposed.def_impl(_push)
_transposed.def_abstract_eval(lambda *avals, types, **static: list(types))
ad.primitive_jvps[_transposed] = _derivative_of_push
ad.primitive_transposes[_transposed] = _pull
batching.primitive_batchers[_transposed] = _over_axis
mlir.register_lowering(_transposed, mlir.lower_fun(_push, multiple_results=True))


def _types(f: Callable[..., Sequence[Any]], avals: Sequence[Any]) -> list[Any]:
    return [jax.typeof(out) for out in jax.eval_shape(f, *avals)]


def _derivative(differentiable: Any, primals: Sequence[Any], tangents: Sequence[Any], **static: Any) -> Any:
    moving = [type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents]
    given, along = (tuple(v for v, m in zip(values, moving) if m) for values in (primals, tangents))
    return jax.jvp(differentiable(moving, primals, **static), given, along)


def _batched(mapped: Any, arrays: Sequence[Any], axes: Sequence[int | None], **static: Any) -> tuple:
    out = list(mapped(arrays, axes, **static))
    return out, [0] * len(out)


def _over_stack(
    primitive: Any, batched: Any, arrays: Sequence[Any], axes: Sequence[int | None], **static: Any
) -> tuple:
    """A mapped axis becomes the first of the stack; what is not mapped is repeated along it."""
    if batched is not None and (found := batched(arrays, axes, **static)) is not None:
        return found
    (size,) = {array.shape[axis] for array, axis in zip(arrays, axes) if axis is not None}
    moved = [
        jax.numpy.broadcast_to(array, (size, *array.shape))
        if axis is None
        else jax.numpy.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes)
    ]
    out = primitive.bind(*moved, **static)
    return out, [0] * len(out)


def _lowered(plain: Any, kernel: Any, always: bool, ctx: Any, *values: Any, **static: Any) -> Any:
    context = ctx.module_context
    body = (
        kernel
        if always or (not compat.is_exported(context) and compat.on_one_device(context.axis_context))
        else plain
    )
    return mlir.lower_fun(body, multiple_results=True)(ctx, *values, **static)
