"""Equations that hold other jaxprs: the weights go inside, structured."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.sharding import PartitionSpec, Sharding

from peftjax.core import compat
from peftjax.interpreter.evaluate import ControlRule, Evaluator
from peftjax.interpreter.loops import apart, in_step, layers_first, of_one_layer
from peftjax.interpreter.subfunction import call_once_traced
from peftjax.interpreter.uses import draws
from peftjax.weights.base import Weight, dense


def _jit(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any]:
    def constrained(values: list[Any], shardings: Any) -> list[Any]:
        return [
            lax.with_sharding_constraint(v, s) if isinstance(s, Sharding) and not isinstance(v, Weight) else v
            for v, s in zip(values, shardings)
        ]

    operands = constrained(operands, eqn.params["in_shardings"])
    return constrained(call_once_traced(evaluator, eqn, operands, jax.jit), eqn.params["out_shardings"])


def _call(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any]:
    return evaluator.call(eqn.params.get("call_jaxpr") or eqn.params["jaxpr"])(*operands)


def _remat(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any]:
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return call_once_traced(
        evaluator, eqn, operands, lambda body: jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)
    )


def _scan(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any] | None:
    consts, carry, xs = compat.split_scan(eqn.params, operands)
    xs = layers_first(xs)
    if xs is None:
        return None
    layers, shared = apart(xs)
    body, length = evaluator.call(eqn.params["jaxpr"]), eqn.params["length"]
    # What is scanned has keys of its own for every step.
    steps = jnp.arange(length) if any(map(draws, (*consts, *carry))) else None

    def step(carry: list[Any], now: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        xs, number = now
        out = body(*in_step((*consts, *carry), number), *of_one_layer(xs, shared))
        state = _named_as(carry, out[: len(carry)])
        structures.append(jax.tree.structure(state))
        return state, out[len(carry) :]

    structures = [jax.tree.structure(list(carry))]
    options = {name: eqn.params[name] for name in ("reverse", "unroll")}
    results = _unless_they_differ(
        structures, lambda: lax.scan(step, carry, (layers, steps), length=length, **options)
    )
    if results is None:
        return None
    carry, ys = results
    ys = [y.relabeled(lambda at: at.with_stack(0, length)) if isinstance(y, Weight) else y for y in ys]
    return [*carry, *ys]


def _while(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any] | None:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, rest = operands[:n_cond], operands[n_cond:]
    body_consts, init = rest[:n_body], rest[n_body:]
    cond, body = evaluator.call(eqn.params["cond_jaxpr"]), evaluator.call(eqn.params["body_jaxpr"])
    first = jnp.int32(0) if any(map(draws, operands)) else None

    def goes_on(now: tuple[Any, list[Any]]) -> Any:
        number, state = now
        return cond(*in_step((*cond_consts, *state), number))[0]

    def step(now: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        number, state = now
        out = _named_as(state, body(*in_step((*body_consts, *state), number)))
        structures.append(jax.tree.structure(out))
        return None if number is None else number + 1, out

    structures = [jax.tree.structure(list(init))]
    result = _unless_they_differ(structures, lambda: lax.while_loop(goes_on, step, (first, init)))
    return None if result is None else result[1]


def _cond(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any] | None:
    index, *rest = operands
    first: list[Any] = []
    structures: list[Any] = []

    def noted(branch: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def call(*values: Any) -> list[Any]:
            out = branch(*values)
            first[:] = first or out
            structures.append(jax.tree.structure(out := _named_as(first, out)))
            return out

        return call

    branches = [noted(evaluator.call(branch)) for branch in eqn.params["branches"]]
    return _unless_they_differ(structures, lambda: lax.switch(index, branches, *rest))


def _named_as(others: list[Any], values: list[Any]) -> list[Any]:
    """The values, their weights under the names of the others': one of two weights has one name."""

    def named(value: Any, name: str) -> Weight:
        return value.relabeled(lambda layout: replace(layout, name=name))

    both = [isinstance(o, Weight) and isinstance(v, Weight) for o, v in zip(others, values)]
    return [named(v, o.layout.name) if b else v for b, o, v in zip(both, others, values)]


def _unless_they_differ(structures: list[Any], call: Callable[[], Any]) -> Any:
    """What the call gives; None where the weights that its bodies gave have no common structure."""
    try:
        return call()
    except TypeError:
        if len(set(structures)) > 1:
            return None
        raise


def _custom_jvp(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any]:
    primal = evaluator.call(eqn.params["call_jaxpr"])
    n_consts = eqn.params["num_consts"]
    fn = jax.custom_jvp(lambda *values: primal(*operands[:n_consts], *values))
    symbolic = eqn.params["symbolic_zeros"]

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        # The rule of the equation is told which inputs do not move, where it asked for that.
        still = [symbolic and all(_is_zero(leaf) for leaf in jax.tree.leaves(t)) for t in tangents]
        moving = [_dense_tangent(p, t) for p, t, zero in zip(primals, tangents, still) if not zero]
        jaxpr, consts, zeros = compat.custom_jvp_rule(eqn.params, still)
        out = evaluator.inside().run(jaxpr, [*consts, *primals, *moving])
        outputs, given = out[: len(zeros)], iter(out[len(zeros) :])
        return outputs, [_zero_tangent(o) if z else next(given) for o, z in zip(outputs, zeros)]

    fn.defjvp(rule, symbolic_zeros=symbolic)
    return fn(*operands[n_consts:])


def _dense_tangent(value: Any, tangent: Any) -> Any:
    """The tangent of the dense array from those of its parts."""
    tangent = jax.tree.map(_instantiated, tangent)
    return jax.jvp(dense, (value,), (tangent,))[1] if isinstance(value, Weight) else tangent


def _custom_vjp(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any]:
    primal = evaluator.call(eqn.params["call_jaxpr"])
    n_consts = eqn.params["num_consts"]
    fn = jax.custom_vjp(lambda *values: primal(*operands[:n_consts], *values))

    def forward(*marked: Any) -> tuple[Any, Any]:
        values = custom_vjp_primal_tree_values(marked)
        perturbed = [any(leaf.perturbed for leaf in jax.tree.leaves(value)) for value in marked]
        jaxpr, consts, read = compat.custom_vjp_forward(eqn.params, perturbed)
        residuals, outputs = read(list(values), evaluator.inside().run(jaxpr, [*consts, *values]))
        weights = [value if isinstance(value, Weight) else None for value in values]
        return outputs, (residuals, weights)

    def backward(kept: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        residuals, weights = kept
        if not eqn.params["symbolic_zeros"]:
            cotangents = [_instantiated(ct) for ct in cotangents]
        given = evaluator.trace(compat.custom_vjp_backward(eqn.params))(*residuals, *cotangents)
        return tuple(_pull_back(w, ct) for w, ct in zip(weights, given))

    # Symbolic zeros tell which inputs are differentiated: the rule may do less for the others, or refuse.
    fn.defvjp(forward, backward, symbolic_zeros=True)
    return fn(*operands[n_consts:])


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiated(leaf: Any) -> Any:
    """The array of zeros that a symbolic zero stands for; another leaf as it is."""
    if not _is_zero(leaf):
        return leaf
    shape, dtype = leaf.aval.shape, leaf.aval.dtype
    return np.zeros(shape, dtype) if dtype == jax.dtypes.float0 else jnp.zeros(shape, dtype)


def _pull_back(weight: Weight | None, cotangent: Any) -> Any:
    """The cotangent of a weight's parts from that of its dense array."""
    if weight is None or cotangent is None:
        return cotangent
    parts, tree = jax.tree.flatten(weight)
    floating = [n for n, part in enumerate(parts) if jnp.issubdtype(part.dtype, jnp.floating)]

    def value(floats: list[Any]) -> Any:
        full = list(parts)
        for n, part in zip(floating, floats):
            full[n] = part
        return dense(jax.tree.unflatten(tree, full))

    _, pull = jax.vjp(value, [parts[n] for n in floating])
    cotangents: list[Any] = [np.zeros(part.shape, jax.dtypes.float0) for part in parts]
    for n, ct in zip(floating, pull(cotangent)[0]):
        cotangents[n] = ct
    return jax.tree.unflatten(tree, cotangents)


def _zero_tangent(value: Any) -> Any:
    floating = jnp.issubdtype(value.dtype, jnp.inexact)
    return jnp.zeros_like(value) if floating else np.zeros(value.shape, jax.dtypes.float0)


def _shard_map(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Any] | None:
    body = evaluator.call(eqn.params["jaxpr"])
    specs = eqn.params["in_specs"]
    flat: list[Any] = []
    flat_specs: list[PartitionSpec] = []
    rebuild: list[Callable[[list[Any]], Any]] = []
    plain = [(v.shape, spec) for v, spec in zip(operands, specs) if not isinstance(v, Weight)]
    operands = [v.divided_with(plain) if isinstance(v, Weight) else v for v in operands]
    for value, spec, variable in zip(operands, specs, eqn.params["jaxpr"].invars):
        parts, part_specs, tree = _sharded_parts(value, spec)
        if parts is None:
            return None
        flat, flat_specs = [*flat, *parts], [*flat_specs, *part_specs]
        rebuild.append(_localiser(tree, variable.aval.shape))
    counts = [1 if not isinstance(v, Weight) else len(jax.tree.leaves(v)) for v in operands]

    def local(*parts: Any) -> list[Any]:
        values, at = [], 0
        for n, build in zip(counts, rebuild):
            values.append(build(list(parts[at : at + n])))
            at += n
        return [dense(out) for out in body(*values)]

    run = jax.shard_map(
        local,
        mesh=eqn.params["mesh"],
        in_specs=tuple(flat_specs),
        out_specs=list(eqn.params["out_specs"]),
        check_vma=eqn.params["check_vma"],
        axis_names=set(eqn.params["newly_manual_axes"]),
    )
    with compat.context_of(eqn):
        return run(*flat)


def _sharded_parts(value: Any, spec: PartitionSpec) -> tuple[list[Any] | None, list[Any], Any]:
    if not isinstance(value, Weight):
        return [value], [spec], None
    specs = value.part_specs(spec)
    if specs is None:
        return None, [], None
    # The structure of the specs, which knows the axes of the mesh that a whole sum goes over.
    own, tree = jax.tree.flatten(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.tree.leaves(value), own, tree


def _localiser(tree: Any, local_shape: tuple[int, ...]) -> Callable[[list[Any]], Any]:
    if tree is None:
        return lambda parts: parts[0]
    return lambda parts: jax.tree.unflatten(tree, parts).relabeled(lambda layout: layout.resized(local_shape))


CONTROL: dict[str, ControlRule] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
}
