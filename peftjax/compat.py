"""Every line that depends on the version of JAX, or on an API that JAX does not promise."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend import core as jex
from jax.extend import source_info_util
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

Pull = Callable[..., Sequence[Any]]

_JAX_FOLDER = os.path.dirname(os.path.abspath(jax.__file__))


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, of a closed or an open one (0.11 made them one class)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def inputs_of(jaxpr: Any) -> list[Any]:
    """The variables bound to the constants and then the arguments."""
    return [*jaxpr.constvars, *jaxpr.invars]


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a literal value."""
    return isinstance(atom, jex.Literal)


def at_equation(eqn: Any) -> AbstractContextManager:
    """Where the equation was written: its named scopes, inside the current ones, and its source line."""
    scopes = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=scopes)


def context_of(eqn: Any) -> AbstractContextManager:
    """The mesh and other settings of JAX under which the equation was made."""
    return eqn.ctx.manager


def bind(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Apply an equation's primitive, with its parameters (some of them others) and context, to operands."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params({**eqn.params, **changed}))
    return list(out) if eqn.primitive.multiple_results else [out]


def source_line(eqn: Any) -> str:
    """'file:line' of the innermost frame outside JAX that made the equation, '' when unknown."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not os.path.abspath(frame.file_name).startswith(_JAX_FOLDER):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def split_scan(params: dict[str, Any], values: Sequence[Any]) -> tuple[list, list, list]:
    """A scan's operands as (constants, carry, scanned arrays)."""
    if "ft_in" in params:  # 0.11 and newer
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    n_consts, n_carry = params["num_consts"], params["num_carry"]
    values = list(values)
    return values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]


def custom_jvp_rule(params: dict[str, Any], still: Sequence[bool]) -> tuple[Any, Sequence[Any], list[bool]]:
    """The jaxpr of a custom JVP rule, its constants and which output tangents it leaves out as zero.

    The jaxpr takes the primals (without the call's constants) and one tangent for each that is not still.
    """
    jaxpr, consts, zeros = params["jvp_jaxpr_fun"].call_wrapped(*still)
    return jaxpr, consts, list(zeros)


def custom_vjp_forward(
    params: dict[str, Any], perturbed: Sequence[bool]
) -> tuple[Any, Sequence[Any], Callable[[list, list], tuple[list, list]]]:
    """The forward jaxpr of a custom VJP rule, its constants, and how to read what it returns.

    The reader takes (inputs without the call's constants, outputs of the jaxpr) and gives (residuals,
    primal outputs).
    """
    jaxpr, consts = params["fwd_jaxpr_thunk"].call_wrapped(*perturbed)
    _, residual_tree, forwarded = params["out_trees"]()
    skipped = params["num_consts"] if _constants_are_numbered() else 0

    def read(inputs: list, outputs: list) -> tuple[list, list]:
        n_stored = residual_tree.num_leaves - sum(f is not None for f in forwarded)
        stored = iter(outputs[:n_stored])
        residuals = [next(stored) if f is None else inputs[f - skipped] for f in forwarded]
        return residuals, outputs[n_stored:]

    return jaxpr, consts, read


@cache
def _constants_are_numbered() -> bool:
    """Whether the inputs that a custom VJP rule hands on are numbered behind the call's constants.

    It differs between versions, so it is looked up in a rule whose answer is known.
    """
    constant = np.ones(2, np.float32)
    fn = jax.custom_vjp(lambda x: x * constant)
    fn.defvjp(lambda x: (x * constant, x), lambda x, g: (g,))
    (eqn,) = open_jaxpr(jax.make_jaxpr(fn)(constant))[0].eqns
    params = eqn.params
    params["fwd_jaxpr_thunk"].call_wrapped(True)
    (number,) = params["out_trees"]()[2]
    return params["num_consts"] > 0 and number == params["num_consts"]


def custom_vjp_backward(params: dict[str, Any]) -> Callable[..., list[Any]]:
    """The backward function of a custom VJP rule: (residuals..., cotangents...) -> input cotangents.

    A cotangent that the rule leaves out as zero is None.
    """

    def backward(*operands: Any) -> list[Any]:
        out = params["bwd"].call_wrapped(*operands)
        if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list | tuple):
            out = out[0]  # 0.11 returns (cotangents, logs)
        return [None if type(ct).__name__ in ("Zero", "SymbolicZero") else ct for ct in out]

    return backward


def varying_alike(tree: Any) -> Any:
    """The tree, every leaf cast to vary over all the manual mesh axes that one of them varies over."""
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(tree)))

    return jax.tree.map(lambda leaf: made_to_vary(leaf, axes), tree)


def newly_varying(eqn: Any) -> frozenset:
    """The manual mesh axes over which the equation makes its operand vary."""
    return _varying_of(eqn.outvars[0].aval) - _varying_of(eqn.invars[0].aval)


def made_to_vary(x: Any, axes: frozenset) -> Any:
    """An array cast to vary over these manual mesh axes too."""
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: Any) -> frozenset:
    return _varying_of(jax.typeof(x))


def _varying_of(aval: Any) -> frozenset:
    kind = getattr(aval, "manual_axis_type", None)  # named vma before
    return aval.vma if kind is None else kind.varying


def by_platform(
    name: str,
    plain: Callable[..., Sequence[Any]],
    kernels: Mapping[str, Callable[..., Sequence[Any]]],
    *,
    always: bool = False,
) -> Callable[..., list[Any]]:
    """A function whose body is picked when the program it is part of is lowered for a platform.

    Each body maps arrays and static keywords to a list of arrays of the same types. `kernels[platform]`
    is taken in a program for one device and in the device's own code of a `shard_map`; `plain`, which
    XLA may partition, in every other, in one for `jax.export` and on other platforms; `always` takes the
    kernel in every program for its platform. All arrays lead with axes of a stack: `vmap` adds one.
    Derivatives are those of `plain`.
    """
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    primitive.bodies = {None: plain, **kernels}
    compiled = lru_cache(maxsize=None)(lambda static: jax.jit(partial(primitive.bind, **dict(static))))
    primitive.def_impl(lambda *arrays, **static: compiled(tuple(sorted(static.items())))(*arrays))
    primitive.def_abstract_eval(lambda *avals, **static: _types(partial(plain, **static), avals))
    ad.primitive_jvps[primitive] = partial(_derivative_of_plain, primitive, plain)
    batching.primitive_batchers[primitive] = partial(_over_stack, primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=True))
    for platform, kernel in kernels.items():
        mlir.register_lowering(primitive, partial(_lowered, plain, kernel, always), platform=platform)
    return primitive.bind


def one_equation(
    name: str,
    body: Callable[..., Sequence[Any]],
    differentiable: Callable[..., Callable[..., Sequence[Any]]],
    mapped: Callable[..., Sequence[Any]],
) -> Callable[..., list[Any]]:
    """A function of arrays and static keywords that is one equation in a jaxpr until it is differentiated.

    `body(*arrays, **static)` is what it runs. `differentiable(moving, arrays, **static)` gives the function,
    with a rule, that stands for it where those `arrays` for which `moving` is True have a tangent; it takes
    these alone. `mapped(arrays, axes, **static)` gives the outputs mapped over those axes, axis 0 of each.
    """
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    primitive.bodies = {None: body}
    primitive.def_impl(body)
    primitive.def_abstract_eval(lambda *avals, **static: _types(partial(body, **static), avals))
    ad.primitive_jvps[primitive] = partial(_derivative, differentiable)
    batching.primitive_batchers[primitive] = partial(_batched, mapped)
    mlir.register_lowering(primitive, mlir.lower_fun(body, multiple_results=True))
    return primitive.bind


def transpose_of(pull: Pull, linear: Pull, residuals: Any, tangents: Any, outputs: Any) -> list[Any]:
    """The tangents of some outputs: what a linear map makes of tangents, given as the map's transpose.

    It is one equation, which reverse mode turns into `pull` and which keeps the residuals alone. Forward
    mode runs the transpose of `linear`, and so does what differentiates the tangents again.

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


def with_constants(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., list[Any]], list[Any]]:
    """`fn` as `(constants, *args) -> flat outputs`, and the constants: the arrays that it closes over."""
    jaxpr, constants = open_jaxpr(jax.make_jaxpr(fn)(*args))
    return lambda constants, *args: jax.core.eval_jaxpr(jaxpr, constants, *args), list(constants)


def callable_of(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its arguments."""
    return jex.jaxpr_as_fun(closed)


def body_for(primitive: Any, platform: str) -> Callable[..., Sequence[Any]] | None:
    """What a primitive of `by_platform` runs in a program for one device; None for any other primitive."""
    bodies = getattr(primitive, "bodies", None)
    return None if bodies is None else bodies.get(platform, bodies[None])


def grid_size(params: dict[str, Any]) -> int | None:
    """How often a `pallas_call` equation runs its body; None where that is not known."""
    grid = params["grid_mapping"].grid
    return math.prod(grid) if all(isinstance(length, int) for length in grid) else None


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
    zeros, tangents = varying_alike((zeros, list(tangents), list(residuals)))[:2]
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


_transposed = jex.Primitive("transposed")
_transposed.multiple_results = True
_transposed.bodies = {None: _push}
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


def _over_stack(primitive: Any, arrays: Sequence[Any], axes: Sequence[int | None], **static: Any) -> tuple:
    """A mapped axis becomes the first of the stack; what is not mapped is repeated along it."""
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
    body = kernel if always or (not _exported(context) and _on_one_device(context.axis_context)) else plain
    return mlir.lower_fun(body, multiple_results=True)(ctx, *values, **static)


def _exported(context: Any) -> bool:
    """Whether `jax.export` lowers the code, which must run with later versions: no kernel promises that."""
    return getattr(context.lowering_parameters, "for_export", False)


def _on_one_device(context: Any) -> bool:
    """Whether XLA will not partition the code being lowered: the rule of JAX's own Mosaic kernels."""
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    if not hasattr(context, "manual_axes"):
        return False
    manual = context.manual_axes | set(context.mesh.manual_axes)
    return manual == set(context.mesh.axis_names)


def number_of_shards(params: dict[str, Any]) -> int:
    """How many shards a `shard_map` equation runs its body for."""
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def topology_devices(platform: str, name: str, **options: Any) -> tuple[jax.Device, ...]:
    """The devices of a machine that need not exist; programs can be compiled for them, not run."""
    return tuple(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)


def padded_shape(shape: Sequence[int], layout: Any) -> tuple[int, ...]:
    """An array's axes as a device holds them, major first, filled up to whole tiles of its layout."""
    axes = [shape[axis] for axis in layout.major_to_minor]
    tile = layout.tiling[0] if layout.tiling else ()
    axes = [1] * (len(tile) - len(axes)) + axes
    whole = len(axes) - len(tile)
    return (*axes[:whole], *(-(-size // step) * step for size, step in zip(axes[whole:], tile)))
