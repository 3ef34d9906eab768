"""Every line that depends on the version of JAX, or on an API that JAX does not promise."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.extend import core as jex

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


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Apply an equation's primitive, with its parameters and context, to other operands."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
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


def custom_jvp_rule(params: dict[str, Any], n_inputs: int) -> tuple[Any, Sequence[Any], list[bool]]:
    """The jaxpr of a custom JVP rule, its constants and which output tangents it leaves out as zero.

    The jaxpr takes the primals (without the call's constants) and one tangent for each.
    """
    jaxpr, consts, zeros = params["jvp_jaxpr_fun"].call_wrapped(*[False] * n_inputs)
    return jaxpr, consts, list(zeros)


def custom_vjp_forward(
    params: dict[str, Any], n_inputs: int
) -> tuple[Any, Sequence[Any], Callable[[list, list], tuple[list, list]]]:
    """The forward jaxpr of a custom VJP rule, its constants, and how to read what it returns.

    The reader takes (inputs, outputs of the jaxpr) and gives (residuals, primal outputs).
    """
    jaxpr, consts = params["fwd_jaxpr_thunk"].call_wrapped(*[True] * n_inputs)
    _, residual_tree, forwarded = params["out_trees"]()

    def read(inputs: list, outputs: list) -> tuple[list, list]:
        n_stored = residual_tree.num_leaves - sum(f is not None for f in forwarded)
        stored = iter(outputs[:n_stored])
        residuals = [next(stored) if f is None else inputs[f] for f in forwarded]
        return residuals, outputs[n_stored:]

    return jaxpr, consts, read


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


def number_of_shards(params: dict[str, Any]) -> int:
    """How many shards a `shard_map` equation runs its body for."""
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def topology_device(platform: str, name: str, **options: Any) -> jax.Device:
    """The first device of a machine that need not exist; programs can be compiled for it, not run."""
    return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices[0]


def padded_shape(shape: Sequence[int], layout: Any) -> tuple[int, ...]:
    """An array's axes as a device holds them, major first, filled up to whole tiles of its layout."""
    axes = [shape[axis] for axis in layout.major_to_minor]
    tile = layout.tiling[0] if layout.tiling else ()
    axes = [1] * (len(tile) - len(axes)) + axes
    whole = len(axes) - len(tile)
    return (*axes[:whole], *(-(-size // step) * step for size, step in zip(axes[whole:], tile)))
