"""Trees and paths, errors, differences between versions of JAX."""
