"""Checkpoints that others quantized: how each format lies in the file, one format a file.

A format is a `Scheme`: which tensors of a module belong together, and the `GroupCodes` that they say.
"""
