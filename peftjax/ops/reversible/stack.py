"""The reversible stack as one equation, its forward scan and its backward scan."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from peftjax.core import compat, primitives
from peftjax.core.derivatives import with_backward
from peftjax.interpreter.evaluate import Evaluator
from peftjax.interpreter.loops import apart, in_step, layers_first, of_one_layer
from peftjax.interpreter.uses import draws
from peftjax.ops.reversible.coupling import Coupling, Pair, Plan

Branch = Callable[[Any, Any, Array], Array]
"""`(shared, layer, x) -> update`, of the shape and dtype of x."""


def reversible(
    f: Branch, g: Branch, pair: Pair, shared: Any, layers: Any, coupling: Coupling, *, every: int = 0
) -> Pair:
    """The streams after all layers.

    Args:
        f: F.
        g: G.
        pair: x1 and x2, of one shape and floating dtype.
        shared: what all layers read, a tree of arrays.
        layers: what each layer reads, a tree of arrays [L, ...].
        coupling: of the streams.
        every: layers between two kept pairs; 0 keeps the last alone.
    """
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    layer_leaves, layer_tree = jax.tree.flatten(layers)
    length = layer_leaves[0].shape[0]

    def flat(branch: Branch) -> Callable[..., list[Array]]:
        def call(*values: Array) -> list[Array]:
            first, rest = values[: len(shared_leaves)], values[len(shared_leaves) : -1]
            of_all, of_one = jax.tree.unflatten(shared_tree, first), jax.tree.unflatten(layer_tree, rest)
            return [branch(of_all, of_one, values[-1])]

        return call

    plan = Plan(coupling, length, min(every or length, length), len(shared_leaves))
    return bind(flat(f), flat(g), pair, shared_leaves, layer_leaves, plan)


def bind(f: Any, g: Any, pair: Pair, shared: list[Any], layers: list[Any], plan: Plan) -> Pair:
    """The equation, of functions `(*shared, *layer, x) -> [update]`."""
    one = [layer[0] for layer in layers]  # for the types alone
    call_f, of_f = compat.with_constants(f, *shared, *one, pair[1])
    call_g, of_g = compat.with_constants(g, *shared, *one, pair[0])
    shared = [*of_f, *of_g, *shared]
    n, start = len(of_f), len(of_f) + len(of_g)
    f, g = (
        jax.make_jaxpr(call)(*shared, *one, pair[0])
        for call in (
            lambda *values: call_f(values[:n], *values[start:]),
            lambda *values: call_g(values[n:start], *values[start:]),
        )
    )
    plan = dataclasses.replace(plan, num_shared=len(shared))
    return tuple(_stack(*pair, *shared, *layers, f=f, g=g, plan=plan))


def _run(*operands: Any, f: Any, g: Any, plan: Plan) -> list[Array]:
    pair, shared, layers = plan.split(operands)

    def step(pair: Pair, layer: list[Any]) -> tuple[Pair, None]:
        return _after(f, g, plan, shared, layer, pair), None

    return list(lax.scan(step, pair, layers)[0])


def _run_keeping(*operands: Any, f: Any, g: Any, plan: Plan) -> Pair:
    """The kept pairs [num_kept, ...], that after the last layer last."""
    if plan.num_kept == 1:
        return tuple(x[None] for x in _run(*operands, f=f, g=g, plan=plan))
    pair, shared, layers = plan.split(operands)

    def step(carry: tuple[Pair, Pair], xs: tuple[list[Any], Array]) -> tuple[tuple[Pair, Pair], None]:
        (pair, kept), (layer, slot) = carry, xs
        pair = _after(f, g, plan, shared, layer, pair)
        put = partial(lax.dynamic_update_index_in_dim, index=slot, axis=0)
        return (pair, tuple(map(put, kept, pair))), None

    room = tuple(lax.broadcast(x, (plan.num_kept,)) for x in pair)  # sharded as x; all of it is written
    return lax.scan(step, (pair, room), (layers, jnp.asarray(plan.slots()[0])))[0][1]


def _after(f: Any, g: Any, plan: Plan, shared: list[Any], layer: list[Any], pair: Pair) -> Pair:
    """The streams after one layer."""
    of_f, of_g = map(compat.callable_of, (f, g))
    return plan.coupling.forward(
        lambda x: of_f(*shared, *layer, x)[0], lambda x: of_g(*shared, *layer, x)[0], pair
    )


def _differentiable(moving: Sequence[bool], operands: Sequence[Any], *, f: Any, g: Any, plan: Plan) -> Any:
    """The stack as a function with a rule, of the operands that have a tangent."""

    def whole(values: Sequence[Any]) -> list[Any]:
        given = iter(values)
        return [next(given) if moves else operand for operand, moves in zip(operands, moving)]

    def stack(*values: Any) -> list[Array]:
        return _run(*whole(values), f=f, g=g, plan=plan)

    def forward(*values: Any) -> tuple[list[Array], Any]:
        kept = _run_keeping(*whole(values), f=f, g=g, plan=plan)
        return [x[-1] for x in kept], (kept, whole(values)[2:])

    def backward(residuals: Any, cotangents: list[Array]) -> tuple[Any, ...]:
        kept, others = residuals
        found = _pull_back(f, g, plan, moving, kept, others, tuple(cotangents))
        return tuple(ct for ct, moves in zip(found, moving) if moves)

    return with_backward(stack, forward, backward)


def _pull_back(
    f: Any, g: Any, plan: Plan, moving: Sequence[bool], kept: Pair, others: list[Any], cotangents: Pair
) -> list[Any]:
    """The cotangents of all operands, None for those that do not move."""
    coupling = plan.coupling
    _, shared, layers = plan.split([None, None, *others])
    _, *moves = plan.split(moving)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        pair, d_pair, d_shared = carry
        layer, slot, is_kept = xs
        (y1, y2), (d1, d2) = coupling.ordered(pair), coupling.ordered(d_pair)
        of_g, pull = _vjp(g, (shared, layer), moves, y1)
        shared_g, layer_g, dx = pull(d2)
        d1 = d1 + dx
        before = _before(plan, kept, slot, is_kept)
        x2 = before(1, coupling.before_g(y2, of_g))
        of_f, pull = _vjp(f, (shared, layer), moves, x2)
        shared_f, layer_f, dx = pull(d1)
        x1 = before(0, coupling.before_f(y1, of_f))
        d_pair = (coupling.lam * d1, coupling.beta * d2 + dx)
        add = partial(jax.tree.map, jnp.add)
        return ((x1, x2), d_pair, add(d_shared, add(shared_g, shared_f))), add(layer_g, layer_f)

    last = tuple(x[-1] for x in kept)
    start = (last, cotangents, [jnp.zeros_like(x) for x in _picked(shared, moves[0])])
    _, slots, is_kept = plan.slots()
    xs = (layers, jnp.asarray(slots), jnp.asarray(is_kept))
    (_, d_pair, d_shared), d_layers = lax.scan(step, start, xs, reverse=True)
    none = [None] * len(shared), [None] * len(layers)
    return [*d_pair, *_filled(none[0], moves[0], d_shared), *_filled(none[1], moves[1], d_layers)]


def _vjp(jaxpr: Any, operands: Any, moves: Any, x: Array) -> tuple[Array, Callable[[Array], Any]]:
    """F or G at x, and its pull-back to the operands (shared, of the layer) that move, and to x."""

    def call(some_shared: list[Any], some_layer: list[Any], x: Array) -> Array:
        shared, layer = map(_filled, operands, moves, (some_shared, some_layer))
        return compat.callable_of(jaxpr)(*shared, *layer, x)[0]

    return jax.vjp(call, *map(_picked, operands, moves), x)


def _before(plan: Plan, kept: Pair, slot: Array, is_kept: Array) -> Callable[[int, Array], Array]:
    """Of stream n before a layer, the kept one where there is one, else what the inverse gave."""

    def choose(n: int, inverted: Array) -> Array:
        if plan.num_kept == 1:
            return inverted
        return jnp.where(is_kept, lax.dynamic_index_in_dim(kept[n], slot, keepdims=False), inverted)

    return choose


def _picked(values: Sequence[Any], moves: Sequence[bool]) -> list[Any]:
    return [value for value, does in zip(values, moves) if does]


def _filled(values: Sequence[Any], moves: Sequence[bool], moving: Sequence[Any]) -> list[Any]:
    given = iter(moving)
    return [next(given) if does else value for value, does in zip(values, moves)]


def _mapped(operands: Sequence[Any], axes: Sequence[int | None], *, f: Any, g: Any, plan: Plan) -> Pair:
    """The stack of F and G mapped over one more axis, which comes first in both streams."""
    (size,) = {x.shape[axis] for x, axis in zip(operands, axes) if axis is not None}
    pair, shared, layers = plan.split(operands)
    of_pair, of_shared, of_layers = plan.split(axes)
    pair = tuple(
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(pair, of_pair)
    )
    layers = [x if axis is None else jnp.moveaxis(x, axis, 1) for x, axis in zip(layers, of_layers)]
    inside = (*of_shared, *(None if axis is None else 0 for axis in of_layers), 0)
    f, g = (jax.vmap(compat.callable_of(jaxpr), inside) for jaxpr in (f, g))
    return bind(f, g, pair, shared, layers, plan)


def _on_weights(evaluator: Evaluator, eqn: Any, operands: list[Any]) -> list[Array] | None:
    """The stack of F and G on the parts of structured weights."""
    plan = eqn.params["plan"]
    pair, shared, layers = plan.split(operands)
    layers = layers_first(layers)
    if layers is None:
        return None
    layers, of_all = apart(layers)
    steps = jnp.arange(plan.length) if any(map(draws, shared)) else None

    def branch(jaxpr: Any) -> Branch:
        body = evaluator.call(jaxpr)

        def of_layer(both: tuple[list[Any], list[Any]], now: tuple[list[Any], Any], x: Array) -> Array:
            (shared, of_all), (layer, number) = both, now
            return body(*in_step(shared, number), *of_one_layer(layer, of_all), x)[0]

        return of_layer

    f, g = (branch(eqn.params[name]) for name in ("f", "g"))
    return list(reversible(f, g, pair, (shared, of_all), (layers, steps), plan.coupling, every=plan.every))


_stack = primitives.one_equation("reversible", _run, _differentiable, _mapped, _on_weights)
