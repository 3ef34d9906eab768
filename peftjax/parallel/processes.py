"""Several processes as one: those of a TPU slice, of a JobSet, of a SLURM job, or named by hand."""

import threading
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from peftjax.core.checks import at_least
from peftjax.core.errors import PeftError

T = TypeVar("T")

LOST_AFTER = 30
"""Seconds without a sign of life after which a process counts as lost."""


def join_processes(
    coordinator: str | None = None,
    count: int | None = None,
    number: int | None = None,
    *,
    lost_after: int = LOST_AFTER,
) -> None:
    """Make this process one of several, whose devices `jax.devices()` then has: `jax.distributed.initialize`.

    On Cloud TPU, GKE and SLURM JAX finds the others by itself. It has to come before anything is computed.

    Args:
        coordinator: HOST:PORT of the first process, where they are named by hand.
        count: how many processes there are.
        number: which this one is, from 0.
        lost_after: seconds without a sign of life after which a process is lost: JAX then ends the others.

    Raises:
        PeftError: some of the three are given and some not, or the others are not found.
    """
    at_least("distributed", "lost_after", lost_after, 1)
    given = {"coordinator": coordinator, "processes": count, "process": number}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise PeftError(
            f"distributed: {', '.join(missing)} is missing beside the others; give all three or none"
        )
    try:
        jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=lost_after)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PeftError(
            f"distributed: the other processes are not found ({reason}); on a cluster that JAX does not "
            "know, give coordinator, processes and process"
        ) from error


def leave_processes(seconds: float = 10.0) -> None:
    """Before this process ends: tell the others so, and wait for them to end too, but only so long.

    Those that still work find it lost when it has ended. Of one process alone there is nothing to do.
    """
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(seconds)


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
