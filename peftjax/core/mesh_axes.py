"""The names of a mesh's axes, and what of an activation or a weight lies over which."""

import itertools
import math
from collections.abc import Mapping, Sequence

AXES = ("data", "fsdp", "expert", "tensor", "sequence")
"""data: rows of the batch, with all weights on every device; fsdp: rows, and of each weight the axis that
`tensor` does not divide; expert: the same, but of the weights of experts whole experts, which stay where they
lie; tensor: heads and inner features, or whole experts; sequence: tokens of a row."""
ROWS = ("data", "fsdp", "expert")
TOKENS = ("sequence",)
FEATURES = ("tensor",)
GATHERED = ("fsdp", "expert")
"""Over which a weight is put together where it is used."""
EXPERTS = ("expert", "tensor")
"""Over which the experts of a layer are dealt out."""


def dividing(size: int, names: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that divide a size together, of the most devices; none of size 1."""
    some = [name for name in names if sizes[name] > 1]
    choices = (c for n in range(len(some), -1, -1) for c in itertools.combinations(some, n))
    fits = [c for c in choices if size % math.prod(sizes[name] for name in c) == 0]
    return max(fits, key=lambda c: math.prod(sizes[name] for name in c))
