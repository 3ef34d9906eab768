"""An elementwise optimizer step on large arrays, one slice of their leading axis at a time.

Codes are decoded in the body of a loop: of a stacked parameter `[L, in, out]` one layer's moments are in
float32 at once. The loop writes codes and updates where the old codes and the gradient lie, so a step whose
state is donated needs no second copy of either.
"""

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

Leaves = list[Any]
"""Arrays, coded arrays or None."""
Step = Callable[[Leaves, Leaves, Leaves | None, Key[Array, ""] | None], tuple[Leaves, Leaves]]
"""`(updates, state, params, key) -> (updates, state)`, elementwise, on lists of leaves."""
_Part = Callable[[Any], Any]


@dataclass(frozen=True)
class Cut:
    """How the axis of `[n, ...]` is cut: as `[groups, parts, n / groups / parts, ...]`, by its second axis.

    Where n is sharded over a number of devices that divides `groups`, each has a piece of every slice.
    """

    groups: int = 1
    parts: int = 1

    def take(self, x: Array, number: Array) -> Array:
        """Slice `number` of an array, `[n / parts, ...]`."""
        view = self._view(x)
        length = view.shape[1] // self.parts
        taken = lax.dynamic_slice_in_dim(view, number * length, length, 1)
        return taken.reshape(self.groups * length, *x.shape[1:])

    def put(self, x: Array, new: Array, number: Array) -> Array:
        """The array with another slice `number`."""
        view = self._view(x)
        length = view.shape[1] // self.parts
        new = new.reshape(self.groups, length, *x.shape[1:])
        return lax.dynamic_update_slice_in_dim(view, new, number * length, 1).reshape(x.shape)

    def _view(self, x: Array) -> Array:
        return x.reshape(self.groups, x.shape[0] // self.groups, *x.shape[1:])


def cut_of(shape: tuple[int, ...], most: int) -> Cut:
    """The fewest equal slices of at most `most` numbers, or as small as they can be.

    A stack `[n, ..., in, out]` is cut between its members, a matrix `[n, m]` in up to 64 groups of rows.
    """
    if len(shape) < 2 or math.prod(shape) <= most:
        return Cut()
    groups = math.gcd(shape[0], 64) if len(shape) == 2 else 1
    length = shape[0] // groups
    row = groups * math.prod(shape[1:])
    parts = (
        n for n in range(1, length + 1) if length % n == 0 and (length // n * row <= most or n == length)
    )
    return Cut(groups, min(parts))


def run_slicewise(
    step: Step,
    updates: Leaves,
    state: Leaves,
    params: Leaves | None,
    key: Key[Array, ""] | None,
    *,
    owners: Sequence[int | None],
    cuts: Sequence[Cut],
) -> tuple[Leaves, Leaves]:
    """`step`, slice by slice for each parameter that is cut.

    A step on one parameter gets empty arrays, `[0, ...]`, instead of all others, so that the
    trees, and what depends on paths and numbers of axes (masks), stay what they are.

    Args:
        step: elementwise.
        updates: one per parameter.
        state: leaves of the state.
        params: one per parameter.
        key: of the step's noise; every slice has its own.
        owners: for each leaf of the state, the index of the parameter whose leading axis it has, or None.
        cuts: of each parameter; those in one part are stepped on together.
    """
    whole = frozenset(place for place, cut in enumerate(cuts) if cut.parts == 1)
    places = range(len(updates))

    def take(tree: tuple[Leaves, Leaves, Leaves | None], chosen: Container[int], part: _Part) -> Any:
        return [
            None if leaves is None else _pick(leaves, of, chosen, part)
            for leaves, of in zip(tree, (places, owners, places))
        ]

    new_updates, new_state = step(*take((updates, state, params), whole, lambda leaf: leaf), key)
    for place in places:
        if place not in whole:
            mine = [n for n, owner in enumerate(owners) if owner == place]
            moved = _run_one(step, (updates, state, params), key, place, mine, cuts[place], take)
            new_updates[place], owned = moved
            for n, leaf in zip(mine, owned):
                new_state[n] = leaf
    return new_updates, new_state


def _run_one(
    step: Step,
    tree: tuple[Leaves, Leaves, Leaves | None],
    key: Key[Array, ""] | None,
    place: int,
    mine: list[int],
    cut: Cut,
    take: Callable[..., Any],
) -> tuple[Any, Leaves]:
    """The update of one parameter and what of the state it owns, slice by slice, in place."""
    updates, state, params = tree

    def body(number: Array, carry: tuple[Any, Leaves]) -> tuple[Any, Leaves]:
        def part(leaf: Any) -> Any:
            return jax.tree.map(lambda x: cut.take(x, number), leaf)

        def put(old: Array, new: Array) -> Array:
            return cut.put(old, new, number)

        update, owned = carry
        given = _replaced(updates, [place], [update]), _replaced(state, mine, owned), params
        noise = None if key is None else jax.random.fold_in(jax.random.fold_in(key, place), number)
        moved, new = step(*take(given, (place,), part), noise)
        return put(update, moved[place]), jax.tree.map(put, owned, [new[n] for n in mine])

    return lax.fori_loop(0, cut.parts, body, (updates[place], [state[n] for n in mine]))


def _pick(leaves: Leaves, owners: Iterable[int | None], chosen: Container[int], part: _Part) -> Leaves:
    """Slices of the chosen parameters' leaves, empty ones of the others', and all leaves of none."""
    return [
        leaf if owner is None else part(leaf) if owner in chosen else _empty(leaf)
        for leaf, owner in zip(leaves, owners)
    ]


def _replaced(leaves: Leaves, places: Iterable[int], new: Iterable[Any]) -> Leaves:
    changed = dict(zip(places, new))
    return [changed.get(place, leaf) for place, leaf in enumerate(leaves)]


def _empty(leaf: Any) -> Any:
    """An array with the axes of `leaf` and no numbers; a scalar stays."""
    return jnp.zeros((0, *leaf.shape[1:]), leaf.dtype) if leaf.shape else leaf
