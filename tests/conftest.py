"""Eight CPU devices, so that sharded programs run anywhere; set before JAX starts."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
