"""Every line that depends on the version of JAX, or on an API that JAX does not promise."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend import core as jex
from jax.extend import source_info_util

logger = logging.getLogger(__name__)

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

    The jaxpr takes the primals (without the call's constants) and one tangent for each differentiated primal.
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


def with_constants(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., list[Any]], list[Any]]:
    """`fn` as `(constants, *args) -> flat outputs`, and the constants: the arrays that it closes over."""
    jaxpr, constants = open_jaxpr(jax.make_jaxpr(fn)(*args))
    return lambda constants, *args: jax.core.eval_jaxpr(jaxpr, constants, *args), list(constants)


def callable_of(closed: Any) -> Callable[..., list[Any]]:
    """A closed jaxpr as a function of its arguments."""
    return jex.jaxpr_as_fun(closed)


def grid_size(params: dict[str, Any]) -> int | None:
    """How often a `pallas_call` equation runs its body; None where that is not known."""
    grid = params["grid_mapping"].grid
    return math.prod(grid) if all(isinstance(length, int) for length in grid) else None


def is_exported(context: Any) -> bool:
    """Whether `jax.export` lowers the code, which must run with later versions: no kernel promises that."""
    return getattr(context.lowering_parameters, "for_export", False)


def on_one_device(context: Any) -> bool:
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


def text_of(compiled: Any) -> str | None:
    """The text of a compiled program; None of one whose compiler is newer than what reads it here."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        logger.warning("the compiled program cannot be read: %s", str(error).splitlines()[0])
        return None


def padded_shape(shape: Sequence[int], layout: Any) -> tuple[int, ...]:
    """An array's axes as a device holds them, major first, filled up to whole tiles of its layout."""
    axes = [shape[axis] for axis in layout.major_to_minor]
    tile = layout.tiling[0] if layout.tiling else ()
    axes = [1] * (len(tile) - len(axes)) + axes
    whole = len(axes) - len(tile)
    return (*axes[:whole], *(-(-size // step) * step for size, step in zip(axes[whole:], tile)))
