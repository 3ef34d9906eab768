"""The names of a mesh's axes, and what of an activation lies over which."""

AXES = ("data", "fsdp", "tensor", "sequence")
"""data: rows of the batch, with all weights on every device; fsdp: rows, and of each weight the axis that
`tensor` does not divide; tensor: heads and inner features; sequence: tokens of a row."""
ROWS = ("data", "fsdp")
TOKENS = ("sequence",)
FEATURES = ("tensor",)
