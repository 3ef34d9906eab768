"""Targets whose matrices share arrays: those of one name and shape, the numbers of layers left out."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jax import Array

from peftjax.core import naming
from peftjax.methods._targets import Target

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PooledTarget(Target):
    """A target whose matrices share arrays with those of others.

    Attributes:
        pool: the number of the arrays.
        first: the number of its first matrix among those that share them.
        sharing: how many matrices do.
    """

    pool: int
    first: int
    sharing: int

    @property
    def count(self) -> int:
        """How many matrices it has."""
        return int(np.prod(self.stack))


def pooled(
    found: Sequence[Target],
    kind: Callable[[Target], Hashable] = lambda target: target.layout.matrix,
    *,
    layers_pattern: str | None = None,
) -> list[PooledTarget]:
    """The targets with their pools; in each, matrices are numbered in the order of the layers.

    Args:
        found: the targets.
        kind: what those of one pool have in common, beside their name.
        layers_pattern: the name of the list of layers.
    """
    groups: dict[Hashable, list[Target]] = {}
    for own in found:
        groups.setdefault((_name(own.path), kind(own)), []).append(own)
    placed: dict[str, PooledTarget] = {}
    for pool, group in enumerate(groups.values()):
        group = sorted(group, key=lambda own: naming.layer_index(own.path, layers_pattern) or 0)
        counts = [int(np.prod(own.stack)) for own in group]
        for number, own in enumerate(group):
            place = {"pool": pool, "first": sum(counts[:number]), "sharing": sum(counts)}
            placed[own.path] = PooledTarget(**vars(own), **place)
    return [placed[own.path] for own in found]


def in_pools(targets: Sequence[Target]) -> dict[int, list[PooledTarget]]:
    """The targets of each pool, in the order of the layers."""
    found: dict[int, list[PooledTarget]] = {}
    for target in targets:
        assert isinstance(target, PooledTarget)
        found.setdefault(target.pool, []).append(target)
    return {pool: sorted(own, key=lambda target: target.first) for pool, own in found.items()}


def of_pool(shared: Mapping[str, T], target: Target) -> dict[str, T]:
    """The arrays of a target's pool, by their names without its number."""
    assert isinstance(target, PooledTarget)
    end = str(target.pool)
    return {name.rstrip("0123456789"): own for name, own in shared.items() if _number(name) == end}


def numbered(arrays: Mapping[str, Array], pool: int) -> dict[str, Any]:
    """The arrays of a pool by the names that they have among those of all pools."""
    return {f"{name}{pool}": array for name, array in arrays.items()}


def _number(name: str) -> str:
    return name[len(name.rstrip("0123456789")) :]


def _name(path: str) -> str:
    """A path without the numbers of layers."""
    return "/".join(part for part in path.split("/") if not part.isdigit())
