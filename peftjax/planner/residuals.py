"""The residuals of the backward pass, read from the traced program: nothing is run or compiled."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.core import compat


def kept_arrays(fn: Callable[..., Any], trainable: Any, *inputs: Any) -> list[jax.core.ShapedArray]:
    """The arrays that `jax.vjp(fn, trainable, *inputs)` keeps, but for its inputs.

    An array that is itself an input (a weight, a token), with its gradient or without, is not counted, and
    one that is kept for several operations is counted once. Of layers that are scanned, one array has the
    values of all.

    Args:
        fn: `(trainable, *inputs) -> outputs`, differentiated by `trainable`.
        trainable: arrays or their shapes.
        inputs: as `trainable`; not differentiated.
    """

    def residuals(trainable: Any, *inputs: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda trainable: fn(trainable, *inputs), trainable)[1])

    jaxpr = compat.open_jaxpr(jax.make_jaxpr(residuals)(trainable, *inputs))[0]
    given = set(compat.inputs_of(jaxpr))
    same: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "stop_gradient" and not compat.is_literal(eqn.invars[0]):
            same[eqn.outvars[0]] = same.get(eqn.invars[0], eqn.invars[0])
    variables = [same.get(v, v) for v in jaxpr.outvars if not compat.is_literal(v)]
    made = dict.fromkeys(v for v in variables if not compat.is_literal(v) and v not in given)
    return [variable.aval for variable in made]


def nbytes(arrays: Sequence[Any]) -> int:
    """The bytes of arrays or of their shapes; a random key counts as its data."""
    total = 0
    for array in arrays:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(array.shape, array.dtype))
        total += math.prod(array.shape) * array.dtype.itemsize
    return total
