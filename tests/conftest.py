"""How every test compiles; set before JAX starts.

Eight CPU devices, so that sharded programs run anywhere. LLVM optimises little, because a test compiles a
program to run it once: what XLA decides (fusion, memory, FLOPs) stays the same. A flag of the caller's wins.
"""

import os

os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
