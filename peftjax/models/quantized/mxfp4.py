"""MXFP4 as gpt-oss's checkpoints have it (OCP microscaling formats): experts' weights in blocks of 32.

<name>_blocks   uint8 [experts, out, in / 32, 16], the first of two codes in the low bits
<name>_scales   uint8 [experts, out, in / 32], exponents plus 127
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.models.quantized.scheme import Parts, Scheme, whole
from peftjax.models.quantized.words import swapped
from peftjax.quantize.formats import FORMATS
from peftjax.quantize.groups import GroupCodes
from peftjax.quantize.scales import PowerScales


def of_experts(settings: Mapping[str, Any]) -> Scheme:
    """How the weights of a checkpoint lie; its `quantization_config` says nothing that changes it."""
    return Scheme("mxfp4", "blocks|scales", "blocks", _shape, _codes, joint="_", weight="", dtype="bfloat16")


def _shape(parts: Parts) -> tuple[int, ...]:
    *outputs, groups, each = parts["blocks"].shape
    return (*outputs, 2 * groups * each)


def _codes(parts: Parts, dtype: np.dtype) -> GroupCodes:
    return mxfp4(whole(parts, "blocks"), whole(parts, "scales"), dtype)


def mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype | str = "bfloat16") -> GroupCodes:
    """The codes `[experts, out, in]` of a tensor.

    Args:
        blocks: uint8 `[experts, out, in / 32, 16]`.
        scales: uint8 `[experts, out, in / 32]`.
        dtype: what they decode to.

    Raises:
        PeftError: the shapes or dtypes are others.
    """
    if blocks.shape != (*scales.shape, 16) or blocks.dtype != np.uint8 or scales.dtype != np.uint8:
        raise PeftError(
            f"MXFP4 is uint8 blocks [..., groups, 16] and uint8 scales [..., groups], not {blocks.dtype} "
            f"{list(blocks.shape)} and {scales.dtype} {list(scales.shape)}"
        )
    codes = swapped(blocks).reshape(*scales.shape[:-1], -1)
    return GroupCodes(
        codes, PowerScales(scales), None, FORMATS["mxfp4"], 32 * scales.shape[-1], np.dtype(dtype)
    )
