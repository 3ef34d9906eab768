"""How every test compiles; set before JAX starts.

Eight CPU devices, so that sharded programs run anywhere. LLVM optimises little, because a test compiles a
program to run it once: what XLA decides (fusion, memory, FLOPs) stays the same. A flag of the caller's wins.
"""

import os
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)

MAPS = Path("/proc/self/maps")
MANY = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drop compiled programs between files: they map pieces of memory, of which Linux allows 65,530."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
