"""Small run states, the folder that keeps them and a disk that is full, for tests of checkpoints."""

import resource
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import optax

from peftjax.io import checkpoint


def state(step, value=1.0, width=3):
    trainable = {"blocks": {"query": {"a": jnp.full((2, width), value)}}, "head": jnp.ones(2)}
    return checkpoint.RunState(
        trainable=trainable,
        opt_state=optax.adamw(1e-3).init(trainable),
        key=jax.random.key(7),
        step=step,
        data={"next": 3 * step},
        progress={"best": None, "waited": 0},
    )


def opened(folder, keep_last=1, keep_best=1):
    return checkpoint.open_checkpoints(folder, keep_last=keep_last, keep_best=keep_best)


@contextmanager
def no_file_larger_than(size):
    """As on a full disk, the operating system refuses to write on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
