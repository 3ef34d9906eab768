"""What a compiled step holds beside its arguments and results."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding

import peftjax as pj
from peftjax.planner.machine import find_machine

SLICE = 2**20
SHAPES = {"up": (8, 1024, 2752), "down": (8, 2752, 1024), "q": (8, 1024, 1024), "words": (8192, 1024)}


def machine(name):
    try:
        return find_machine(name)
    except pj.PeftError as error:
        pytest.skip(str(error))


def temporaries(tx, target):
    """Bytes of an update whose gradients and state are donated, as in a training step."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    sharding = SingleDeviceSharding(target.device)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    args = jax.tree.map(place, (params, jax.eval_shape(tx.init, params), params))
    lowered = (
        jax.jit(tx.update, donate_argnums=(0, 1)).trace(*args).lower(lowering_platforms=(target.platform,))
    )
    return lowered.compile(dict(target.options)).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_a_step_on_a_gpu_decodes_one_slice_at_a_time(key):
    wrap = lambda size: pj.optim.eight_bit(optax.adamw(1e-3), key=key, slice_size=size)
    # The largest slice is one of the stack `up`: two moments of it in float32.
    slice_bytes = 2 * 4 * 1024 * 2752
    assert temporaries(wrap(SLICE), machine("h200")) < 1.3 * slice_bytes
    # Without slices, a whole stack's.
    assert temporaries(wrap(2**40), machine("h200")) > 7 * slice_bytes
