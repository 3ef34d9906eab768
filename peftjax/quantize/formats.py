"""The formats of quantized weights by their names."""

from typing import Literal

from peftjax.quantize.binary_sums import BinarySum
from peftjax.quantize.elements import (
    BNB_FP4,
    E2M1,
    NF4,
    Float8,
    Integers,
    Table,
    half_integers,
    powers_of_two,
)
from peftjax.quantize.groups import Format

FormatName = Literal[
    "nf4",
    "fp4",
    "int8",
    "int4",
    "int3",
    "int2",
    "fp8_e4m3",
    "fp8_e5m2",
    "mxfp4",
    "nvfp4",
    "power_of_two",
    "statsq4",
    "statsq3",
    "statsq2",
    "bcq1",
    "bcq2",
    "bcq3",
    "bcq4",
]
"""A format of weights.

- `nf4`: the 4-bit NormalFloat, a scale for 64 numbers (QLoRA, arXiv 2305.14314).
- `fp4`: the 4-bit float of bitsandbytes, likewise.
- `int8`, `int4`, `int3`, `int2`: whole numbers, a scale for each output (8 bits) or for 128, 64, 64 inputs.
- `fp8_e4m3`, `fp8_e5m2`: jax's floats of one byte, a scale for each output.
- `mxfp4`: the OCP microscaling float of 4 bits, a power of two for 32 numbers. `nvfp4`: the same float, a
  float8 for 16 numbers and a float32 for the matrix (arXiv 2509.25149).
- `power_of_two`: `±2^-k`, 5 bits, of the largest of each output's (ShiftAddViT, arXiv 2306.06446).
- `statsq4`, `statsq3`, `statsq2`: half whole numbers within twice the mean size of each output's weights,
  made for `train=True` (OFQ, arXiv 2302.02210).
- `bcq1` ... `bcq4`: sums of 1 to 4 binaries, which have a scale each for 128 numbers (binary-coding
  quantization; ShiftAddLLM, arXiv 2406.05981). With scales of the form `e8m0` they are powers of two.
"""

_GROUPED_4 = {"group": 64, "exact_scale": True, "runs_on": True}

FORMATS: dict[str, Format] = {
    "nf4": Format(Table(NF4), **_GROUPED_4),
    "fp4": Format(Table(BNB_FP4), **_GROUPED_4),
    "int8": Format(Integers(8)),
    "int4": Format(Integers(4), group=128),
    "int3": Format(Integers(3), group=64, search=20),
    "int2": Format(Integers(2), group=64, search=20),
    "fp8_e4m3": Format(Float8("float8_e4m3fn")),
    "fp8_e5m2": Format(Float8("float8_e5m2")),
    "mxfp4": Format(Table(E2M1, "even"), group=32, scales="e8m0"),
    "nvfp4": Format(Table(E2M1, "even"), group=16, scales="e4m3"),
    "power_of_two": Format(powers_of_two(5), scales="e8m0"),
    "statsq4": Format(half_integers(4), range="mean"),
    "statsq3": Format(half_integers(3), range="mean"),
    "statsq2": Format(half_integers(2), range="mean"),
    **{f"bcq{bits}": Format(BinarySum(bits), group=128) for bits in (1, 2, 3, 4)},
}


def describe(form: Format) -> str:
    """A format in a few words: its name here, the group, the scales."""
    if isinstance(form.element, BinarySum):
        names = [f"bcq{form.element.bits} of {form.element.rounds} rounds"]
    else:
        names = [name for name, known in FORMATS.items() if known.element == form.element]
    name = names[0] if names else f"{form.element.bits}-bit numbers with zero points"
    of = "each row" if form.group is None else f"{form.group} numbers"
    rotation = ", rotated" if form.rotate else ""
    return f"{name} with a {form.scales} scale for {of}{rotation}"
