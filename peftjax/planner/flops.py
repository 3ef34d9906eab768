"""FLOPs of a traced program, counted from its shapes: the products, with every loop counted in full.

    product        2 · |lhs| · (free axes of rhs)          `dot_general`, ragged ones (all rows in a group)
    convolution    2 · N · (C_in / groups) · C_out · Π (pairs of place and tap that meet an input)
    scan           length · body;   remat: as often as it is traced, so what is recomputed counts again
    cond           the branch of the platform where the platform chooses, else the largest
    while          its condition and body once: the number of turns is not known
    pallas_call    its `cost_estimate`, else the grid's size · body
    shard_map      body · number of shards

A multiplication and an addition are two. Element-wise operations, reductions and sorts count nothing, and
neither does what no output needs: backward rules leave such products, and the compiler drops them. What
cannot be counted is named, never left out in silence: a `while` with products, a Pallas kernel on a grid
of unknown size, foreign calls, decompositions and Fourier transforms. (The compiler's own
`cost_analysis()` counts a loop's body once, and a GPU's gives nothing for a topology.)
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from peftjax.core import compat, primitives

UNCOUNTED = (
    "cholesky", "eigh", "fft", "ffi_call", "householder_product", "lu", "qr", "svd", "triangular_solve",
)  # fmt: skip
"""Primitives with many operations that no formula here covers."""


@dataclass(frozen=True)
class Flops:
    """A count, and what it leaves out.

    Attributes:
        total: floating-point operations.
        uncounted: names of operations that are not, or not fully, in `total`; sorted.
        by_dtype: the part of `total` whose operands' dtype is known, by its name; of two the narrower.
    """

    total: int
    uncounted: tuple[str, ...] = ()
    by_dtype: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.total + other.total,
            tuple(sorted({*self.uncounted, *other.uncounted})),
            dict(Counter(self.by_dtype) + Counter(other.by_dtype)),
        )

    def __mul__(self, times: int) -> "Flops":
        of_dtypes = {dtype: count * times for dtype, count in self.by_dtype.items()}
        return Flops(self.total * times, self.uncounted, of_dtypes)


def count_flops(jaxpr: Any, platform: str = "cpu") -> Flops:
    """The FLOPs of a jaxpr, open or closed, lowered for `platform` ("cpu", "cuda", "tpu")."""
    inner = compat.open_jaxpr(jaxpr)[0]
    return _count(inner, [True] * len(inner.outvars), platform)[0]


def _count(jaxpr: Any, used: Sequence[bool], platform: str) -> tuple[Flops, list[bool]]:
    """The FLOPs that the outputs in use need, and which inputs they need."""
    total = Flops(0)
    live = {variable for variable, use in zip(jaxpr.outvars, used) if use and not compat.is_literal(variable)}
    for eqn in reversed(jaxpr.eqns):
        of_outputs = [variable in live for variable in eqn.outvars]
        if any(of_outputs) or eqn.effects:
            flops, needed = of_equation(eqn, of_outputs, platform)
            total += flops
            live |= {v for v, need in zip(eqn.invars, needed) if need and not compat.is_literal(v)}
    return total, [variable in live for variable in jaxpr.invars]


def of_equation(eqn: Any, used: list[bool], platform: str) -> tuple[Flops, list[bool]]:
    """The FLOPs that the outputs in use need of an equation, and which of its inputs they need."""
    if eqn.primitive.name == "scan":
        return _of_scan(eqn.params, used, len(eqn.invars), platform)
    flops = _of_primitive(eqn, platform)
    if flops is not None:
        return flops, [True] * len(eqn.invars)
    jaxprs = [compat.open_jaxpr(inner)[0] for inner in inner_jaxprs(eqn.params)]
    if len(jaxprs) == 1 and len(jaxprs[0].invars) == len(eqn.invars):  # a call: jit, remat, custom rules
        return _count(jaxprs[0], used, platform)
    return sum((count_flops(inner, platform) for inner in jaxprs), Flops(0)), [True] * len(eqn.invars)


def _of_scan(
    params: dict[str, Any], used: list[bool], n_inputs: int, platform: str
) -> tuple[Flops, list[bool]]:
    """The body with the outputs in use, and with the carries that those in use need in later turns."""
    body = compat.open_jaxpr(params["jaxpr"])[0]
    n_carry = len(compat.split_scan(params, [False] * n_inputs)[1])
    carried = used[:n_carry]
    while True:
        flops, needed = _count(body, [*carried, *used[n_carry:]], platform)
        wanted = compat.split_scan(params, needed)[1]
        if all(have or not want for have, want in zip(carried, wanted)):
            return flops * params["length"], needed
        carried = [have or want for have, want in zip(carried, wanted)]


def _of_primitive(eqn: Any, platform: str) -> Flops | None:
    """The FLOPs of a primitive that has a formula here, or is named as uncounted."""
    name, params = eqn.primitive.name, eqn.params
    match name:
        case "dot_general":
            (_, contracted), (_, batch) = params["dimension_numbers"]
            return _of_product(eqn, _product(eqn, (*contracted, *batch)))
        case "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"]
            (_, contracted), (_, batch) = numbers.dot_dimension_numbers
            return _of_product(eqn, _product(eqn, (*contracted, *batch, *numbers.rhs_group_dimensions)))
        case str() if name.startswith(("ragged_product", "ragged_outer")):
            return _of_product(eqn, 2 * eqn.invars[0].aval.size * eqn.outvars[0].aval.shape[-1])
        case "conv_general_dilated":
            return _of_product(eqn, _convolution(eqn))
        case "while":
            turn = count_flops(params["cond_jaxpr"], platform) + count_flops(params["body_jaxpr"], platform)
            return turn + Flops(0, ("while (one turn counted)",) if turn.total else ())
        case "cond":
            return _branch(params, platform)
        case "shard_map":
            return count_flops(params["jaxpr"], platform) * compat.number_of_shards(params)
        case "pallas_call":
            return _kernel(params, platform)
    if (body := primitives.body_for(eqn.primitive, platform)) is not None:
        shapes = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
        return count_flops(jax.make_jaxpr(partial(body, **params))(*shapes), platform)
    return Flops(0, (name,)) if name in UNCOUNTED else None


def _kernel(params: dict[str, Any], platform: str) -> Flops:
    if params["cost_estimate"] is not None:
        return Flops(params["cost_estimate"].flops)
    size = compat.grid_size(params)
    if size is None:
        return Flops(0, (f"pallas_call {params['name']}",))
    return count_flops(params["jaxpr"], platform) * size


def _of_product(eqn: Any, count: int) -> Flops:
    """The FLOPs of a product of an equation's first two inputs."""
    dtype = min((variable.aval.dtype for variable in eqn.invars[:2]), key=lambda dtype: dtype.itemsize)
    return Flops(count, by_dtype={dtype.name: count})


def _product(eqn: Any, shared: tuple[int, ...]) -> int:
    """Of a product whose right operand has the axes `shared` in common with the left, or chosen by it."""
    lhs, rhs = (variable.aval for variable in eqn.invars[:2])
    return 2 * lhs.size * math.prod(size for axis, size in enumerate(rhs.shape) if axis not in shared)


def _convolution(eqn: Any) -> int:
    (lhs, rhs), out, params = (v.aval for v in eqn.invars), eqn.outvars[0].aval, eqn.params
    numbers = params["dimension_numbers"]
    pairs = 1
    for axis, (low, _) in enumerate(params["padding"]):
        inputs, taps, outputs = (
            array.shape[spec[2 + axis]]
            for array, spec in zip((lhs, rhs, out), (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
        )
        stride, spread = params["window_strides"][axis], params["lhs_dilation"][axis]
        places = (
            output * stride + tap * params["rhs_dilation"][axis] - low
            for output in range(outputs)
            for tap in range(taps)
        )
        pairs *= sum(place % spread == 0 and 0 <= place // spread < inputs for place in places)
    batch, features = (out.shape[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * rhs.shape[numbers.rhs_spec[1]] * pairs


def _branch(params: dict[str, Any], platform: str) -> Flops:
    counts = [count_flops(branch, platform) for branch in params["branches"]]
    for count, platforms in zip(counts, params.get("branches_platforms") or ()):
        if platforms is None or platform in platforms:
            return count
    return max(counts, key=lambda count: count.total) + Flops(
        0, tuple({name for count in counts for name in count.uncounted})
    )


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if hasattr(compat.open_jaxpr(inner)[0], "eqns"):
                yield inner
