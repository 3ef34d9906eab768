"""The memory of a training step, asked of the compiler."""
