"""A stack of layers that keeps its outputs only: backward makes every layer's inputs again by inverting it.

Two streams `(x1, x2)` of one shape pass through L layers of two functions each,

    y1 = λ x1 + F(x2)        y2 = β x2 + G(y1)        next (x1, x2) = (y1, y2), or (y2, y1) when swapped

    x2 = (y2 - G(y1)) / β    x1 = (y1 - F(x2)) / λ

`reversible` is one equation in a jaxpr, which holds F and G of a layer as jaxprs. Differentiated, it is one
`custom_vjp` over a scan: the forward scan keeps the last pair of streams (with `every`, the pair after
every `every` layers, counted from the last), the backward scan makes F and G of each layer again, inverts
them and pulls the cotangents back. Beside those pairs backward reads its own operands and nothing else.
Operands that nothing is differentiated by have no tangent and get no cotangent: none is computed.

`peftjax.adapt` rebuilds the equation with F and G on the parts of structured weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from peftjax import compat

Pair = tuple[Float[Array, "..."], Float[Array, "..."]]
Branch = Callable[[Any, Any, Array], Array]
"""`(shared, layer, x) -> update`, of the shape and dtype of x."""


@dataclasses.dataclass(frozen=True)
class Coupling:
    """How the two streams meet in a layer.

    Attributes:
        lam: λ.
        beta: β.
        swap: whether the two change places after a layer.
    """

    lam: float
    beta: float
    swap: bool

    def forward(self, f: Callable[[Array], Array], g: Callable[[Array], Array], pair: Pair) -> Pair:
        """The streams after a layer."""
        x1, x2 = pair
        y1 = self.lam * x1 + f(x2)
        y2 = self.beta * x2 + g(y1)
        return self.ordered((y1, y2))

    def before_g(self, y2: Array, of_g: Array) -> Array:
        """`x2 = (y2 - G(y1)) / β`."""
        return (y2 - of_g) * (1.0 / self.beta)

    def before_f(self, y1: Array, of_f: Array) -> Array:
        """`x1 = (y1 - F(x2)) / λ`."""
        return (y1 - of_f) * (1.0 / self.lam)

    def ordered(self, pair: Pair) -> Pair:
        """`(y1, y2)` as the next layer takes them, and the other way round."""
        return pair[::-1] if self.swap else pair


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a reversible stack.

    Attributes:
        coupling: of the streams.
        length: L.
        every: layers between two kept pairs, 1 to L.
        num_shared: how many of the flat operands all layers share.
    """

    coupling: Coupling
    length: int
    every: int
    num_shared: int

    @property
    def num_kept(self) -> int:
        """How many pairs are kept."""
        return -(-self.length // self.every)

    def slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each layer, where the pair after it goes, and where and whether the pair before it is kept.

        Pairs of layers that share a slot overwrite each other, so that the last one stays.
        """
        left = self.length - np.arange(self.length)  # layers from this one on
        after, before = ((self.num_kept - 1 - n // self.every).astype(np.int32) for n in (left - 1, left))
        kept = (left % self.every == 0) & (left < self.length)
        return after, np.maximum(before, 0), kept

    def split(self, operands: Sequence[Any]) -> tuple[Any, list[Any], list[Any]]:
        """The operands as (pair of streams, shared, stacked)."""
        end = 2 + self.num_shared
        return tuple(operands[:2]), list(operands[2:end]), list(operands[end:])


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
    return list(lax.scan(partial(_step, f, g, plan, shared), pair, (layers,))[0])


def _step(f: Any, g: Any, plan: Plan, shared: list[Any], pair: Pair, xs: tuple) -> tuple[Pair, None]:
    of_f, of_g = (lambda x, call=call: call(*shared, *xs[0], x)[0] for call in map(compat.callable_of, (f, g)))
    return plan.coupling.forward(of_f, of_g, pair), None


def _run_keeping(f: Any, g: Any, plan: Plan, operands: Sequence[Any]) -> Pair:
    """The kept pairs [num_kept, ...], that after the last layer last."""
    pair, shared, layers = plan.split(operands)
    if plan.num_kept == 1:
        return tuple(x[None] for x in _run(*operands, f=f, g=g, plan=plan))

    def step(carry: tuple[Pair, Pair], xs: tuple) -> tuple[tuple[Pair, Pair], None]:
        (pair, kept), (slot, *layer) = carry, xs
        pair, _ = _step(f, g, plan, shared, pair, layer)
        put = partial(lax.dynamic_update_index_in_dim, index=slot, axis=0)
        return (pair, tuple(map(put, kept, pair))), None

    empty = tuple(jnp.zeros_like(x, shape=(plan.num_kept, *x.shape)) for x in pair)
    return lax.scan(step, (pair, empty), (jnp.asarray(plan.slots()[0]), layers))[0][1]


def _differentiable(moving: Sequence[bool], operands: Sequence[Any], *, f: Any, g: Any, plan: Plan) -> Any:
    """The stack as a function with a rule, of the operands that have a tangent."""

    def whole(values: Sequence[Any]) -> list[Any]:
        given = iter(values)
        return [next(given) if moves else operand for operand, moves in zip(operands, moving)]

    @jax.custom_vjp
    def stack(*values: Any) -> list[Array]:
        return _run(*whole(values), f=f, g=g, plan=plan)

    def forward(*values: Any) -> tuple[list[Array], Any]:
        kept = _run_keeping(f, g, plan, whole(values))
        return [x[-1] for x in kept], (kept, whole(values)[2:])

    def backward(residuals: Any, cotangents: list[Array]) -> tuple[Any, ...]:
        kept, others = residuals
        found = _pull_back(f, g, plan, moving, kept, others, tuple(cotangents))
        return tuple(ct for ct, moves in zip(found, moving) if moves)

    stack.defvjp(forward, backward)
    return stack


def _pull_back(
    f: Any, g: Any, plan: Plan, moving: Sequence[bool], kept: Pair, others: list[Any], cotangents: Pair
) -> list[Any]:
    """The cotangents of all operands, None for those that do not move."""
    coupling = plan.coupling
    _, shared, layers = plan.split([None, None, *others])
    _, shared_moves, layer_moves = plan.split(moving)

    def vjp(jaxpr: Any, layer: list[Any], x: Array) -> tuple[Array, Any]:
        def call(some_shared: list[Any], some_layer: list[Any], x: Array) -> Array:
            of_all, of_one = _filled(shared, shared_moves, some_shared), _filled(layer, layer_moves, some_layer)
            return compat.callable_of(jaxpr)(*of_all, *of_one, x)[0]

        return jax.vjp(call, _picked(shared, shared_moves), _picked(layer, layer_moves), x)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        pair, d_pair, d_shared = carry
        layer, slot, is_kept = xs
        (y1, y2), (d1, d2) = coupling.ordered(pair), coupling.ordered(d_pair)
        of_g, pull = vjp(g, layer, y1)
        shared_g, layer_g, dx = pull(d2)
        d1 = d1 + dx
        before = _before(plan, kept, slot, is_kept)
        x2 = before(1, coupling.before_g(y2, of_g))
        of_f, pull = vjp(f, layer, x2)
        shared_f, layer_f, dx = pull(d1)
        x1 = before(0, coupling.before_f(y1, of_f))
        d_pair = (coupling.lam * d1, coupling.beta * d2 + dx)
        add = partial(jax.tree.map, jnp.add)
        return ((x1, x2), d_pair, add(d_shared, add(shared_g, shared_f))), add(layer_g, layer_f)

    last = tuple(x[-1] for x in kept)
    start = (last, cotangents, [jnp.zeros_like(x) for x in _picked(shared, shared_moves)])
    _, slots, is_kept = plan.slots()
    xs = (layers, jnp.asarray(slots), jnp.asarray(is_kept))
    (_, d_pair, d_shared), d_layers = lax.scan(step, start, xs, reverse=True)
    return [
        *d_pair,
        *_filled([None] * len(shared), shared_moves, d_shared),
        *_filled([None] * len(layers), layer_moves, d_layers),
    ]


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


_stack = compat.one_equation("reversible", _run, _differentiable, _mapped)
