"""Accelerators to compile for that this machine need not have."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, SingleDeviceSharding

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
device_description_str: "NVIDIA H200"
"""


def devices(platform):
    """The devices of a TPU v5e of four chips, or of one H200; skips where its compiler is not installed."""
    try:
        if platform == "tpu":
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
            return get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        return get_topology_desc("h200", "cuda", topology="1x1x1", target_config=H200).devices
    except Exception as error:
        pytest.skip(f"The compiler for {platform} is not installed: {str(error)[:100]}")


def compiled(f, shapes, platform, shardings=None):
    """`f` compiled for one device, or for arguments of the given shardings."""
    if shardings is None:
        one = SingleDeviceSharding(devices(platform)[0])
        shardings = jax.tree.map(lambda _: one, shapes)
    place = lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    operands = jax.tree.map(place, shapes, shardings)
    options = {"xla_gpu_autotune_level": 0} if platform == "cuda" else None
    return jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,)).compile(options)


def mesh(platform, shape, names):
    """A mesh of the platform's devices."""
    return Mesh(np.array(devices(platform)).reshape(shape), names)


def shape(*lengths, dtype=jnp.float32):
    """The type of an argument."""
    return jax.ShapeDtypeStruct(lengths, dtype)
