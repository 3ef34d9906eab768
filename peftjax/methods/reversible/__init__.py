"""Blocks whose inputs are recomputed from their outputs."""
