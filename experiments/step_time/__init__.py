"""The time of a training step, method beside method."""
