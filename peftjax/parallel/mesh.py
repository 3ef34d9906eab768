"""A mesh of devices, as one text says it."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from peftjax.backbone.on_mesh import row_and_token_axes
from peftjax.core.errors import PeftError
from peftjax.core.mesh_axes import AXES, ROWS
from peftjax.core.tree import nearest


def make_mesh(
    sizes: str | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of devices, whose axes are `AXES`, in this order.

    Args:
        sizes: of the axes, such as "fsdp=4,tensor=2"; those that are left out are 1. By default all devices
            are on "fsdp".
        devices: by default all of `jax.devices()`, those of other processes too.

    Raises:
        PeftError: as `read_mesh`; the sizes are not those of so many devices.

    Examples:
        >>> pj.parallel.make_mesh().shape["fsdp"] == len(jax.devices())
        True
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"fsdp": len(devices)} if sizes is None else read_mesh(sizes)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        asked = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise PeftError(
            f"mesh {asked!r} is of {math.prod(shape)} devices and there are {len(devices)}; "
            "give sizes whose product is that"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=tuple(devices))


def find_mesh(sizes: str | None, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh that an option asks for: 'all' is all devices on fsdp, and so is None of several processes."""
    if sizes is None and (devices is not None or jax.process_count() == 1):
        return None
    return make_mesh(None if sizes == "all" else sizes, devices)


def require_rows(caller: str, rows: int, mesh: Mesh, tokens: int = 1) -> None:
    """Raise a PeftError unless the axes of rows divide so many, or what is left of them their tokens.

    Otherwise every device would have all of them.
    """
    used = row_and_token_axes(rows, tokens, mesh)
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    if any(mesh.shape[axis] > 1 and not any(axis in axes for axes in used) for axis in ROWS):
        raise PeftError(
            f"{caller}: {rows} rows at a time are not divided by the {devices} devices of data, fsdp and "
            "expert; choose a multiple, or put some of the devices on another axis"
        )


def read_mesh(sizes: str | Mapping[str, int]) -> dict[str, int]:
    """The sizes of a mesh's axes by name, of a text such as "fsdp=8,tensor=4".

    Raises:
        PeftError: an axis is unknown or named twice, or a size is no positive whole number.
    """
    if isinstance(sizes, str):
        pairs = [part.partition("=")[::2] for part in sizes.split(",")]
    else:
        pairs = list(sizes.items())
    found: dict[str, int] = {}
    for axis, size in pairs:
        axis = axis.strip()
        if axis not in AXES:
            raise PeftError(f"mesh {sizes!r}: no axis is called {axis!r}; closest: {nearest(axis, AXES)}")
        if axis in found:
            raise PeftError(f"mesh {sizes!r} has {axis!r} twice")
        if not str(size).strip().isdecimal() or int(size) < 1:
            raise PeftError(
                f"mesh {sizes!r}: the size of {axis!r} must be a positive whole number, not {size!r}"
            )
        found[axis] = int(size)
    return found
