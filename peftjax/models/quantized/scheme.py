"""What a format of quantized checkpoints tells the loader, and a weight in one, not read yet."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor
from peftjax.quantize.groups import GroupCodes

Parts = Mapping[str, Tensor]
"""The tensors of one weight by the end of their names, which follows the module's."""


@dataclass(frozen=True)
class Scheme:
    """How weights `[out, in]`, or `[experts, out, in]`, lie in a checkpoint.

    Attributes:
        method: Hugging Face's `quant_method`.
        ends: regular expression of the ends of the names that belong to a weight.
        needed: regular expression of an end without which a weight is no codes.
        shape: `parts -> ([experts,] out, in)`.
        codes: `(parts, dtype) -> the codes of that shape`, or the array itself where no format of ours has
            them.
    """

    method: str
    ends: str
    needed: str
    shape: Callable[[Parts], tuple[int, ...]]
    codes: Callable[[Parts, np.dtype], GroupCodes | np.ndarray]
    joint: str = "."
    weight: str = ".weight"
    dtype: str = "float16"


@dataclass(frozen=True)
class CodedTensor:
    """A weight that a checkpoint holds as codes, not read yet; it stands where a `Tensor` may.

    Attributes:
        name: what its module's weight would be called.
        parts: the tensors that tell it.
        scheme: how.
        shape: `[out, in]`, or `[experts, out, in]`.
        dtype: of the weight that was coded.
    """

    name: str
    parts: Parts
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def file(self) -> Path:
        """The file that holds it, or one of its parts."""
        return next(iter(self.parts.values())).file

    def codes(self, dtype: np.dtype) -> GroupCodes | None:
        """The codes, which decode to `dtype`; None where no format of ours has them."""
        found = self._read(dtype)
        return found if isinstance(found, GroupCodes) else None

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part of the decoded weight at `index`."""
        found = self._read(np.dtype(np.float32))
        whole = np.asarray(found.decode()) if isinstance(found, GroupCodes) else found
        return whole.reshape(self.shape)[index]

    def _read(self, dtype: np.dtype) -> GroupCodes | np.ndarray:
        try:
            return self.scheme.codes(self.parts, dtype)
        except PeftError as error:
            raise PeftError(f"{self.name} of {self.file}: {error}") from error


Stored = Tensor | CodedTensor
"""What a checkpoint holds of a parameter."""


def gathered(
    tensors: Mapping[str, Tensor], scheme: Scheme, dtype: np.dtype
) -> dict[str, Tensor | CodedTensor]:
    """The tensors of a checkpoint with one `CodedTensor` in place of those that belong to a coded weight.

    Args:
        tensors: by name.
        scheme: how the coded ones lie.
        dtype: of what was coded.

    Raises:
        PeftError: a tensor that tells a shape cannot be read.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(rf"(.+){re.escape(scheme.joint)}({scheme.ends})", name):
            modules.setdefault(found[1], {})[found[2]] = tensor
    coded = {
        module: parts
        for module, parts in modules.items()
        if any(re.fullmatch(scheme.needed, end) for end in parts)
    }
    taken = {f"{module}{scheme.joint}{end}" for module, parts in coded.items() for end in parts}
    result: dict[str, Tensor | CodedTensor] = {n: t for n, t in tensors.items() if n not in taken}
    for module, parts in coded.items():
        name = f"{module}{scheme.weight}"
        try:
            shape = scheme.shape(parts)
        except (PeftError, KeyError) as error:
            raise PeftError(
                f"{name}: the checkpoint's {scheme.method} codes cannot be read: {error}"
            ) from error
        result[name] = CodedTensor(name, parts, scheme, shape, dtype)
    return result


def whole(parts: Parts, end: str) -> np.ndarray:
    """All of one tensor.

    Raises:
        PeftError: it is absent or cannot be read.
    """
    if end not in parts:
        raise PeftError(f"has no tensor {end!r} beside {', '.join(sorted(parts))}")
    tensor = parts[end]
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def one_layer(codes: GroupCodes) -> GroupCodes:
    """The codes of a matrix as those of a stack of one."""
    return jax.tree.map(lambda part: part[None], codes)
