"""Codes in words of 32 bits, the first one in a word's low bits, and as they are packed here."""

import numpy as np

from peftjax.quantize.elements import Integers, Natural
from peftjax.quantize.groups import Format, GroupCodes
from peftjax.quantize.packing import pack


def unpacked(words: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The first `width` codes of int32 words `[..., n]`, uint8; a code of 3 bits may lie in two words."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data[..., :width]
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (data[..., None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(*data.shape[:-1], -1)[..., :width]
    single = np.unpackbits(data, axis=-1, count=width * bits, bitorder="little")
    single = single.reshape(*single.shape[:-1], width, bits)
    return (single << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def swapped(data: np.ndarray) -> np.ndarray:
    """Bytes of two codes with these in the other order."""
    return (data >> 4) | (data << 4)


def integers(
    codes: np.ndarray,
    bits: int,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    group: int | None,
    dtype: np.dtype,
) -> GroupCodes:
    """`scale · (code - zero)` as codes of ours.

    Args:
        codes: uint8 `[out, in]`, 0 ... 2^bits - 1.
        bits: of a code.
        scales: `[out, groups]`.
        zeros: integers of that shape; None where all are 2^(bits-1).
        group: how many inputs share a scale; None for all of them.
        dtype: what they decode to.
    """
    width = codes.shape[-1]
    symmetric = zeros is None
    form = Format(
        Integers(bits) if symmetric else Natural(bits),
        group=None if group in (-1, width) else group,
        scales=scales.dtype.name,
    )
    if bits == 8:
        packed = (codes ^ np.uint8(128)).view(np.int8) if symmetric else codes
    else:
        packed = np.asarray(pack(codes, bits))
    kept = None if symmetric else zeros.astype(np.uint8 if zeros.max() < 256 else np.int16)
    return GroupCodes(packed, scales, kept, form, width, dtype)


def decoded(
    codes: np.ndarray, bits: int, scales: np.ndarray, zeros: np.ndarray | None, group_of: np.ndarray
) -> np.ndarray:
    """The array of codes whose inputs lie in groups in any order, float32 `[out, in]`.

    Args:
        codes: as in `integers`.
        bits: of a code.
        scales: `[out, groups]`.
        zeros: as in `integers`.
        group_of: the group of each input.
    """
    values = codes.astype(np.float32)
    values -= np.float32(2 ** (bits - 1)) if zeros is None else zeros.astype(np.float32)[:, group_of]
    values *= scales.astype(np.float32)[:, group_of]
    return values
