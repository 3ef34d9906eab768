"""Whether a function is elementwise, read from its jaxpr."""

from collections.abc import Callable
from typing import Any

import jax

# fmt: off
_ELEMENTWISE = frozenset((
    "abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "div",
    "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
))
# fmt: on
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "cond"})


def is_elementwise(fn: Callable[..., Any], *args: Any) -> bool:
    """Whether each number of the outputs of `fn` depends on scalars and the numbers at the same index alone.

    Reads the jaxpr of `fn` on the arguments (arrays or shapes): on arrays of more than one number only
    operations that are known to be elementwise. So False may be wrong; True is right, except that arrays of
    different parameters of one shape are not told apart.
    """
    return _is_elementwise(jax.make_jaxpr(fn)(*args).jaxpr)


def _is_elementwise(jaxpr: Any) -> bool:
    return all(_is_allowed(equation) for equation in jaxpr.eqns)


def _is_allowed(equation: Any) -> bool:
    name = equation.primitive.name
    large = [v.aval for v in equation.invars if getattr(v.aval, "size", 1) != 1]
    if name in _CALLS:
        return all(_is_elementwise(inner) for inner in _inner(equation.params))
    if not large:  # of scalars: a count, a schedule, or one number put everywhere
        return name == "broadcast_in_dim" or all(getattr(v.aval, "size", 1) == 1 for v in equation.outvars)
    return name in _ELEMENTWISE and all(v.aval.shape == large[0].shape for v in equation.outvars)


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found
