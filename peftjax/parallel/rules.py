"""Which axes of a parameter lie over which axes of a mesh, by its path.

In a block the first matrices of a branch are divided by outputs, the last one by inputs (Megatron, Shoeybi et
al. 2019, arXiv 1909.08053), so that a branch ends in one sum over `tensor`; the other axis of each lies over
`fsdp` and `expert`. Of the matrices of experts, whole ones lie over `expert` and `tensor`, parts over `fsdp`.
"""

import logging
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.core.mesh_axes import AXES, EXPERTS, GATHERED, dividing
from peftjax.core.patterns import fullmatches
from peftjax.weights.base import Weight
from peftjax.weights.coding import code_shardings

logger = logging.getLogger(__name__)

Rules = Sequence[tuple[str, tuple[str | tuple[str, ...] | None, ...]]]
"""`(pattern, axes)`: of a parameter whose whole path the pattern matches, the mesh axes of its last axes. The
first pattern that matches is the parameter's; one that none matches lies whole on every device."""

_COLUMNS, _ROWS = "query|key|value|qkv|up|gate", "output|down"
BLOCKS: Rules = (
    (rf".*blocks/.*/experts/({_COLUMNS})/kernel", (EXPERTS, "fsdp", None)),
    (rf".*blocks/.*/experts/({_ROWS})/kernel", (EXPERTS, None, "fsdp")),
    (r".*blocks/.*/experts/.*/bias", (EXPERTS, None)),
    (r".*blocks/.*/router/kernel", (GATHERED, None)),
    (rf".*blocks/.*/({_COLUMNS})/kernel", (GATHERED, "tensor")),
    (rf".*blocks/.*/({_COLUMNS})/bias", ("tensor",)),
    (rf".*blocks/.*/({_ROWS})/kernel", ("tensor", GATHERED)),
    (r".*/embedding", ("tensor", GATHERED)),
    (r".*/kernel", (GATHERED, "tensor")),
)
"""Those of the backbones here."""


def shardings(params: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Where each array of a tree of parameters lies.

    Args:
        params: arrays or shapes; weights that are codes too, whose arrays lie as the weight would.
        mesh: one of `make_mesh`, or any with the axes that the rules name.
        rules: by default `BLOCKS`.

    Returns:
        A `NamedSharding` for each array. An axis that the mesh does not divide is whole; the parameters that
        this leaves whole on every device are logged, where the mesh would have divided them.

    Raises:
        PeftError: a rule of yours matches no parameter, names an axis that the mesh lacks, or has more axes
            than a parameter that it matches.
    """
    leaves = tree.named_leaves(params)
    leaves = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, tree.Hole)}
    if rules is not None:
        for pattern, _ in rules:
            if not any(fullmatches(pattern, path) for path in leaves):
                near = tree.nearest(pattern, leaves)
                raise PeftError(f"shardings: rule {pattern!r} matches no parameter; closest: {near}")
    found, undivided = {}, []
    for path, leaf in leaves.items():
        spec = spec_of(path, leaf.shape, mesh, rules)
        if not any(spec) and any(
            mesh.shape[name] > 1 for own in axes_of(path, rules) for name in names_of(own)
        ):
            undivided.append(path)
        place = NamedSharding(mesh, spec)
        found[path] = code_shardings(leaf, place) if isinstance(leaf, Weight) else place
    if undivided:
        logger.warning(
            "whole on every device, for the mesh divides none of its axes: %s", ", ".join(undivided)
        )
    return tree.replace(params, found)


def axes_of(path: str, rules: Rules | None = None) -> tuple[Any, ...]:
    """The mesh axes of a parameter's last axes, by the first rule that matches its path."""
    given = BLOCKS if rules is None else rules
    return next((axes for pattern, axes in given if fullmatches(pattern, path)), ())


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules | None = None) -> PartitionSpec:
    """Where a parameter of a path and shape lies; an axis that the mesh does not divide is whole.

    Raises:
        PeftError: its rule names an axis that the mesh lacks, or has more axes than the parameter.
    """
    axes = axes_of(path, rules)
    if len(axes) > len(shape):
        raise PeftError(f"shardings: the rule of {path!r} has {len(axes)} axes, and its shape is {shape}")
    for own in axes:
        for name in names_of(own):
            if name not in mesh.shape:
                raise PeftError(
                    f"shardings: {path!r} is to lie over {name!r}, and the mesh has {', '.join(mesh.shape)}; "
                    f"make one of {', '.join(AXES)}, or give rules of your own"
                )
    last = [fitting(size, own, mesh) for size, own in zip(shape[len(shape) - len(axes) :], axes)]
    return PartitionSpec(*(None,) * (len(shape) - len(axes)), *last)


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """`spec_of` as a sharding."""
    return NamedSharding(mesh, spec_of(path, shape, mesh, rules))


def names_of(own: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one axis of an array."""
    return () if own is None else (own,) if isinstance(own, str) else own


def fitting(size: int, own: str | tuple[str, ...] | None, mesh: Mesh) -> str | tuple[str, ...] | None:
    """The mesh axes of an axis of this size, where they divide it; of several those that do; else None."""
    if own is None or isinstance(own, str):
        return own if own and size % mesh.shape[own] == 0 else None
    found = dividing(size, own, mesh.shape)
    return found if len(found) > 1 else next(iter(found), None)
