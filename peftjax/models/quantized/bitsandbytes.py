"""The checkpoints of bitsandbytes: NF4 and FP4 with or without double quantization, and int8.

weight                   uint8 [numbers / 2, 1], the first of two codes in the high bits
weight.absmax            a scale for each block of the flattened weight: float32, or codes of it, and then
weight.nested_absmax, .nested_quant_map                their scales and table
weight.quant_state.bitsandbytes__nf4, ..__fp4          JSON: shape, blocksize, nested_offset, ...

weight                   int8 [out, in]
SCB                      float32 [out], the largest size of each output: w = weight · SCB / 127
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.models.quantized.scheme import Parts, Scheme, whole
from peftjax.quantize.dynamic_map import dynamic_map
from peftjax.quantize.formats import FORMATS
from peftjax.quantize.groups import GroupCodes
from peftjax.quantize.scales import DOUBLE_BLOCK, DoubleScales

STATE = r"weight\.quant_state\.bitsandbytes__"
NAMES = ("nf4", "fp4")


def bitsandbytes(settings: Mapping[str, Any]) -> Scheme:
    """How the weights of a checkpoint lie: of 4 bits and of 8 alike."""
    ends = rf"weight|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map)|{STATE}\w+|SCB|weight_format"
    return Scheme("bitsandbytes", ends, rf"{STATE}\w+|SCB", _shape, _codes)


def _shape(parts: Parts) -> tuple[int, ...]:
    return parts["weight"].shape if "SCB" in parts else tuple(_state(parts)["shape"])


def _codes(parts: Parts, dtype: np.dtype) -> GroupCodes:
    if "SCB" in parts:
        scales = whole(parts, "SCB")[:, None] / np.float32(127)
        weight = whole(parts, "weight")
        return GroupCodes(weight, scales, None, FORMATS["int8"], weight.shape[-1], dtype)
    return _of_4_bits(parts, _state(parts), dtype)


def _state(parts: Parts) -> dict[str, Any]:
    end = next(end for end in parts if "quant_state" in end)
    try:
        state = json.loads(whole(parts, end).tobytes())
    except ValueError as error:
        raise PeftError(f"{end} is no JSON: {error}") from error
    known = isinstance(state, dict) and all(name in state for name in ("shape", "blocksize", "quant_type"))
    if not known or state["quant_type"] not in NAMES:
        raise PeftError(f"{end} has no shape, blocksize and quant_type of {', '.join(NAMES)}")
    return state


def _of_4_bits(parts: Parts, state: Mapping[str, Any], dtype: np.dtype) -> GroupCodes:
    out, width = state["shape"]
    form = replace(FORMATS[state["quant_type"]], group=state["blocksize"])
    if not np.allclose(whole(parts, "weight.quant_map"), form.element.values, atol=1e-6):
        raise PeftError(f"weight.quant_map is not the table of {state['quant_type']}")
    # Blocks that are no parts of a row run on into the next one.
    rows, width = (out, width) if width % form.group == 0 else (1, out * width)
    codes = whole(parts, "weight").reshape(rows, -1)
    scales = whole(parts, "weight.absmax").reshape(rows, -1)
    if "weight.nested_absmax" not in parts:
        return GroupCodes(codes, scales, None, form, width, dtype)
    table = whole(parts, "weight.nested_quant_map")
    block, mean = whole(parts, "weight.nested_absmax"), np.float32(state["nested_offset"])
    if state["nested_blocksize"] == DOUBLE_BLOCK and np.allclose(table, dynamic_map(True), atol=1e-6):
        double = DoubleScales(scales, block, mean)
        return GroupCodes(codes, double, None, replace(form, scales="double"), width, dtype)
    each = np.repeat(block, state["nested_blocksize"])[: math.prod(scales.shape)].reshape(scales.shape)
    return GroupCodes(codes, table[scales] * each + mean, None, form, width, dtype)
