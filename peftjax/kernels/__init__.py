"""One folder per fused operation: its reference in jnp, its kernels, and the choice between them."""
