"""AWQ's checkpoints (Lin et al. 2023, arXiv 2306.00978) in the "gemm" version, as AutoAWQ writes them.

    qweight  int32 [in, out / 8]        codes of 8 outputs in a word
    qzeros   int32 [groups, out / 8]    likewise
    scales   [groups, out]              w = scale · (code - zero)

From a word's low bits up, the outputs are 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.models.quantized.scheme import Parts, Scheme, whole
from peftjax.models.quantized.words import integers, unpacked
from peftjax.quantize.groups import GroupCodes

_PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
"""Where in a word each output lies."""


def awq(settings: Mapping[str, Any]) -> Scheme:
    """How the weights of a checkpoint lie, from its `quantization_config`.

    Raises:
        PeftError: for bits or a version that is not read.
    """
    bits = settings.get("bits", settings.get("w_bit", 4))
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise PeftError(
            f"AWQ of {bits} bits in the version {version!r} is not read; supported: 4 bits, 'gemm'"
        )
    group = settings.get("group_size", settings.get("q_group_size", 128))
    return Scheme("awq", "qweight|qzeros|scales", "qweight", _shape, partial(_codes, group))


def _shape(parts: Parts) -> tuple[int, int]:
    width, words = parts["qweight"].shape
    return words * 8, width


def _codes(group: int, parts: Parts, dtype: np.dtype) -> GroupCodes:
    codes, zeros = (_in_order(whole(parts, end)) for end in ("qweight", "qzeros"))
    scales = np.ascontiguousarray(whole(parts, "scales").T)
    return integers(codes.T, 4, scales, zeros.T, group, dtype)


def _in_order(words: np.ndarray) -> np.ndarray:
    codes = unpacked(words, 4, 8 * words.shape[-1]).reshape(*words.shape, 8)
    return codes[..., _PLACES].reshape(*words.shape[:-1], -1)
