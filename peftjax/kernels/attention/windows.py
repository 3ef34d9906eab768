"""Layers whose windows differ share one program: its kernels, one for each width, are chosen at run time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def by_window(
    windows: Sequence[int | None],
    window: Array | None,
    keys: int,
    run: Callable[..., Array],
    arrays: tuple[Any, ...],
) -> Array:
    """`run(width, *arrays)`, the width None where it hides no key.

    Args:
        windows: the widths that there are.
        window: the one to take; None where there is one alone.
        keys: how many there are.
        run: `(width, *arrays) -> array`.
        arrays: trees of arrays.
    """
    parts = [partial(run, None if width is None or width >= keys else width) for width in windows]
    if window is None:
        return parts[0](*arrays)
    return lax.switch(jnp.argmax(jnp.asarray(windows) == window), parts, *arrays)
