"""The bases of codes that the experiments compare."""

from collections.abc import Callable
from functools import partial

import peftjax as pj

FORMATS = (
    "int8", "fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp4", "fp4", "int4", "power_of_two", "statsq4", "bcq3",
    "int3", "bcq2", "int2",
)  # fmt: skip
BASES: dict[str, Callable[[], pj.Transform]] = {
    "nf4": pj.nf4,
    "nf4, rotated": partial(pj.nf4, rotate=True),
    **{name: partial(pj.quantized, format=name) for name in FORMATS},
}
"""By name, what makes them."""
