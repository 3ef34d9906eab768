"""GPTQ's checkpoints (Frantar et al. 2022, arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

    qweight  int32 [in · bits / 32, out]       codes along the inputs, the first in the low bits
    qzeros   int32 [groups, out · bits / 32]   zero points along the outputs; in the first format less one
    scales   [groups, out]                     w = scale · (code - zero)
    g_idx    int32 [in]                        the group of each input

Inputs whose groups are in another order (`desc_act`) are no rows of ours: such a weight is decoded.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.models.quantized.scheme import Parts, Scheme, whole
from peftjax.models.quantized.words import decoded, integers, unpacked
from peftjax.quantize.groups import GroupCodes

FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a zero point of the file, by `checkpoint_format`."""
BITS = (2, 3, 4, 8)


def gptq(settings: Mapping[str, Any]) -> Scheme:
    """How the weights of a checkpoint lie, from its `quantization_config`.

    Raises:
        PeftError: for bits or a format that is not read.
    """
    bits, form = settings.get("bits"), settings.get("checkpoint_format") or "gptq"
    if bits not in BITS:
        raise PeftError(f"GPTQ with bits={bits!r} is not read; supported: {', '.join(map(str, BITS))}")
    if form not in FORMATS:
        raise PeftError(f"GPTQ's checkpoint_format {form!r} is not read; supported: {', '.join(FORMATS)}")
    group = settings.get("group_size", -1)
    return Scheme(
        "gptq",
        "qweight|qzeros|scales|g_idx",
        "qweight",
        partial(_shape, bits),
        partial(_codes, bits, group, FORMATS[form], settings.get("sym", True)),
    )


def _shape(bits: int, parts: Parts) -> tuple[int, int]:
    words, out = parts["qweight"].shape
    return out, words * 32 // bits


def _codes(
    bits: int, group: int, more: int, symmetric: bool, parts: Parts, dtype: np.dtype
) -> GroupCodes | np.ndarray:
    out, width = _shape(bits, parts)
    codes = unpacked(whole(parts, "qweight").T, bits, width)
    scales = np.ascontiguousarray(whole(parts, "scales").T)
    zeros = unpacked(whole(parts, "qzeros"), bits, out).T.astype(np.int16) + np.int16(more)
    group = width if group in (-1, None) else group
    if "g_idx" in parts:
        group_of = whole(parts, "g_idx")
        if not np.array_equal(group_of, np.arange(width) // group):
            return decoded(codes, bits, scales, zeros, group_of)
    middle = symmetric and bool((zeros == 2 ** (bits - 1)).all())
    return integers(codes, bits, scales, None if middle else zeros, group, dtype)
