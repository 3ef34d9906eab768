"""The groups of a function: which axes of which weights move together, named by the weight that makes them.

A group is an axis that no fixed one is joined to, that some weight makes and some weight reads: without the
weights' numbers for a unit, the function is the one in which they are zero.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import compat, tree
from peftjax.prune.dimensions import common_prefix
from peftjax.prune.group import Group, Kind, Member
from peftjax.prune.walk import Followed, Walk


def traced_groups(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, Group]:
    """The groups of a function of parameters and inputs, by the first weight that makes their units.

    Args:
        fn: `(params, *inputs) -> outputs`, traced and never run.
        params: arrays or their shapes.
        inputs: examples, or their shapes.
    """
    leaves = {path: leaf for path, leaf in tree.named_leaves(params).items() if tree.is_array(leaf)}
    walk = Walk()

    def flat(arrays: list[Any], inputs: tuple[Any, ...]) -> list[Any]:
        given = tree.replace(params, dict(zip(leaves, arrays, strict=True)))
        return [out for out in jax.tree.leaves(fn(given, *inputs)) if tree.is_array(out)]

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
    jaxpr, constants = compat.open_jaxpr(jax.make_jaxpr(flat)(shapes, inputs))
    values = [walk.of_shape(np.shape(value), fixed=True) for value in constants]
    weights = {path: _weight(walk, path, leaf) for path, leaf in leaves.items()}
    given = [walk.of_shape(jnp.shape(leaf), fixed=True) for leaf in jax.tree.leaves(inputs)]
    walk.fix(*walk.run(jaxpr, [*values, *weights.values(), *given], ()))
    return _named(walk, weights)


def _weight(walk: Walk, path: str, leaf: Any) -> Followed:
    origins = tuple(frozenset({axis}) for axis in range(len(leaf.shape)))
    return Followed(walk.of_shape(leaf.shape).axes, path, origins)


def _named(walk: Walk, weights: dict[str, Followed]) -> dict[str, Group]:
    dimensions = walk.dimensions
    members: dict[int, list[Member]] = defaultdict(list)
    for path, weight in weights.items():
        for number, axis in enumerate(weight.axes):
            parts = dimensions.parts(axis)
            sizes = [dimensions.sizes[part] for part in parts]
            for place, part in enumerate(parts):
                block, repeat = int(np.prod(sizes[place + 1 :])), int(np.prod(sizes[:place]))
                reads = (path, number) in walk.reads
                members[part].append(Member(path, number, block, 0, repeat, reads))
    found: dict[str, Group] = {}
    for part, own in members.items():
        makers = [member for member in own if not member.reads]
        if part in dimensions.fixed or not makers or len(makers) == len(own):
            continue
        around = common_prefix(dimensions.scopes(part))
        if any(walk.loops.get(member.path, ())[: len(around)] != around for member in own):
            around = ()
        stack = tuple(walk.lengths[number] for number in around)
        first = max(makers, key=lambda member: len(weights[member.path].axes)).path
        name, again = first, 2
        while name in found:
            name, again = f"{first}#{again}", again + 1
        found[name] = Group(_kind(walk, own), tuple(own), dimensions.sizes[part], stack)
    return found


def _kind(walk: Walk, members: Sequence[Member]) -> Kind:
    if any(member.path in walk.filters for member in members):
        return "filter"
    return "head" if any(member.block > 1 or member.repeat > 1 for member in members) else "neuron"
