"""Accelerators to compile for that this machine need not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from peftjax.core.errors import PeftError
from peftjax.planner.machine import find_machine

NAMES = {"tpu": "v5e:2x2", "cuda": "h200"}


def machine(platform):
    """A TPU v5e of four chips, or one H200; skips where its compiler is not installed."""
    try:
        return find_machine(NAMES[platform])
    except PeftError as error:
        pytest.skip(str(error))


def devices(platform):
    return machine(platform).devices


def compiled(f, shapes, platform, shardings=None):
    """`f` compiled for one device, or for arguments of the given shardings."""
    target = machine(platform)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(target.device), shapes)
    place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    operands = jax.tree.map(place, shapes, shardings)
    return jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,)).compile(dict(target.options))


def mesh(platform, shape, names):
    """A mesh of the platform's devices."""
    return Mesh(np.array(devices(platform)).reshape(shape), names)


def shape(*lengths, dtype=jnp.float32):
    """The type of an argument."""
    return jax.ShapeDtypeStruct(lengths, dtype)
