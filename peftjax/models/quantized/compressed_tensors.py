"""The checkpoints of compressed-tensors (vLLM's llm-compressor): integers in words, int8, float8.

    weight_packed, weight_shape     int32 [out, in · bits / 32], codes plus 2^(bits-1), from the low bits up
    weight                          int8 or float8_e4m3fn [out, in]
    weight_scale                    [out, groups], or of all outputs [1]; of blocks [out / rows, in / columns]
    weight_zero_point               int32 [out · bits / 32, groups] beside words, else int8 [out, groups]
    weight_g_idx                    int32 [in], the group of each input: such a weight is decoded

What a model computes with activations of fewer bits, this one computes in floats.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import BYTE_FLOATS
from peftjax.models.quantized.scheme import Parts, Scheme, whole
from peftjax.models.quantized.words import decoded, integers, unpacked
from peftjax.quantize.elements import Float8
from peftjax.quantize.groups import Format, GroupCodes

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def compressed_tensors(settings: Mapping[str, Any]) -> Scheme:
    """How the weights of a checkpoint lie, from its `quantization_config`.

    Raises:
        PeftError: for a format that is not read.
    """
    form = settings.get("format")
    if form not in FORMATS:
        raise PeftError(f"compressed-tensors' format {form!r} is not read; supported: {', '.join(FORMATS)}")
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise PeftError(f"compressed-tensors' sparsity format {sparse!r} is not read; supported: dense")
    ends = "weight|weight_(?:packed|shape|scale|zero_point|g_idx)|(?:in|out)put_(?:scale|zero_point)"
    return Scheme("compressed-tensors", ends, "weight_scale", _shape, _codes)


def _shape(parts: Parts) -> tuple[int, ...]:
    return (
        tuple(map(int, whole(parts, "weight_shape"))) if "weight_packed" in parts else parts["weight"].shape
    )


def _codes(parts: Parts, dtype: np.dtype) -> GroupCodes | np.ndarray:
    out, width = _shape(parts)
    scales = _of_rows(whole(parts, "weight_scale"), out)
    group = width // scales.shape[-1]
    if width % scales.shape[-1]:
        raise PeftError(f"has {scales.shape[-1]} scales for {width} inputs")
    if "weight_packed" not in parts and parts["weight"].dtype in BYTE_FLOATS:
        weight = whole(parts, "weight")
        element = Float8(weight.dtype.name)
        form = Format(element, None if group == width else group, scales=scales.dtype.name)
        return GroupCodes(weight, scales, None, form, width, dtype)
    if "weight_packed" in parts:
        words = whole(parts, "weight_packed")
        bits = words.shape[-1] * 32 // width
        codes = unpacked(words, bits, width)
    elif parts["weight"].dtype != np.int8:
        raise PeftError(f"is {parts['weight'].dtype}; read are words of int32, int8 and float8")
    else:
        bits, codes = 8, whole(parts, "weight").view(np.uint8) ^ np.uint8(128)
    zeros = _zeros(parts, bits, out)
    if "weight_g_idx" in parts:
        group_of = whole(parts, "weight_g_idx")
        if (group_of >= 0).all() and not np.array_equal(group_of, np.arange(width) // group):
            return decoded(codes, bits, scales, zeros, group_of)
    return integers(codes, bits, scales, zeros, group, dtype)


def _zeros(parts: Parts, bits: int, out: int) -> np.ndarray | None:
    """The zero points plus 2^(bits-1), as the codes are."""
    if "weight_zero_point" not in parts:
        return None
    found = whole(parts, "weight_zero_point")
    if found.dtype == np.int32 and "weight_packed" in parts:
        return unpacked(found.T, bits, out).T
    return _of_rows(found, out).astype(np.int16) + np.int16(2 ** (bits - 1))


def _of_rows(scales: np.ndarray, out: int) -> np.ndarray:
    """`[out, groups]` of what several outputs may share."""
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    if out % scales.shape[0]:
        raise PeftError(f"has scales for {scales.shape[0]} blocks of {out} outputs")
    return np.repeat(scales, out // scales.shape[0], 0)
