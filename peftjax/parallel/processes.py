"""Several processes as one: those of a TPU slice, of a JobSet, of a SLURM job, or named by hand."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from peftjax.core.errors import PeftError

T = TypeVar("T")


def join_processes(
    coordinator: str | None = None, count: int | None = None, number: int | None = None
) -> None:
    """Make this process one of several, whose devices `jax.devices()` then has: `jax.distributed.initialize`.

    On Cloud TPU, GKE and SLURM JAX finds the others by itself. It has to come before anything is computed.

    Args:
        coordinator: HOST:PORT of the first process, where they are named by hand.
        count: how many processes there are.
        number: which this one is, from 0.

    Raises:
        PeftError: some of the three are given and some not, or the others are not found.
    """
    given = {"coordinator": coordinator, "processes": count, "process": number}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise PeftError(
            f"distributed: {', '.join(missing)} is missing beside the others; give all three or none"
        )
    try:
        jax.distributed.initialize(coordinator, count, number)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PeftError(
            f"distributed: the other processes are not found ({reason}); on a cluster that JAX does not "
            "know, give coordinator, processes and process"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return jax.process_index() == 0


def gathered(arrays: T) -> T:
    """Arrays that lie over several processes as NumPy arrays; all processes have to ask. Others stay."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, arrays)


def put(leaf: jax.Array, place: Sharding) -> jax.Array:
    """An array that all processes have alike, or that lies over them already, where it belongs."""
    if place.is_fully_addressable:
        return jax.device_put(leaf, place)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=place)(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(leaf), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])
