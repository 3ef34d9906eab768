"""Safetensors files, tensor by tensor: find, read and write, with errors that name file and key.

The format (https://github.com/huggingface/safetensors#format) is eight bytes of header length,
a JSON header with each tensor's dtype, shape and byte range, and the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from peftjax.core.errors import PeftError
from peftjax.io.files import read_as, replacing, require_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_CODES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(jnp.bfloat16): "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int16): "I16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}


BYTE_FLOATS = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E5M2": np.dtype(jnp.float8_e5m2)}
"""Floats of one byte by the format's code: numpy has none, and the format's reader for numpy reads none."""
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
"""Ends of the names of weights in formats that are not read."""


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What is read of the index of a sharded checkpoint: the file of each tensor."""

    weight_map: dict[str, str]


def find_tensors(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Map each tensor's name to the file that holds it.

    Args:
        path: a safetensors file, or a folder with `model.safetensors` or the index of a sharded
            checkpoint, `model.safetensors.index.json`.

    Raises:
        PeftError: when there is no such file, a file is truncated or corrupt, or a shard does not
            hold what the index says.
    """
    path = Path(path)
    file = path / SINGLE_FILE if path.is_dir() else path
    if file.is_file():
        with _opened(file) as handle:
            return dict.fromkeys(handle.keys(), file)
    index = path / INDEX_FILE
    if not index.is_file():
        others = sorted(file.name for file in path.glob("*") if file.suffix in OTHER_FORMATS)
        remedy = (
            f"; {others[0]} is of a format that is not read: load it with transformers and write it again by "
            "save_pretrained(folder)"
            if others
            else ""
        )
        raise PeftError(f"no {SINGLE_FILE} or {INDEX_FILE} in {path}{remedy}")
    try:
        shards = read_as(ShardIndex, index).weight_map
    except PeftError as error:
        raise PeftError(f"not the index of a sharded checkpoint: {error}") from error
    for shard in shards.values():
        if Path(shard).name != shard:
            raise PeftError(f"{index} places tensors in {shard!r}, which is no file of its folder")
    held = {}
    for shard in sorted(set(shards.values())):
        with _opened(path / shard) as handle:
            held[shard] = set(handle.keys())
    for name, shard in shards.items():
        if name not in held[shard]:
            raise PeftError(f"{index} places {name} in {shard}, which does not hold it")
    return {name: path / shard for name, shard in shards.items()}


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(name, array)` for each name of `find_tensors`, holding one tensor at a time.

    Raises:
        PeftError: when a file or a tensor of it cannot be read.
    """
    for file in sorted(set(files.values())):
        names = [name for name, place in files.items() if place == file]
        with _opened(file) as handle:
            for name in names:
                try:
                    tensor = handle.get_tensor(name)
                except (SafetensorError, TypeError, AttributeError) as error:
                    raise PeftError(f"cannot read {name} of {file}: {error}") from error
                yield name, tensor


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, not read yet.

    Attributes:
        file: the file that holds it.
        name: its name there.
        shape: its shape.
        dtype: its dtype, or the format's code of one that numpy lacks.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | str

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part at `index`, with a slice of step one for each axis; no other part is read.

        The file is mapped only while this runs: pages of a mapping that stays count as memory in use.

        Raises:
            PeftError: when it cannot be read.
        """
        if self.dtype in BYTE_FLOATS:
            return self._bytes().view(BYTE_FLOATS[self.dtype]).reshape(self.shape)[index]
        with _opened(self.file) as handle:
            try:
                return handle.get_slice(self.name)[index]
            except (SafetensorError, TypeError, AttributeError) as error:
                raise PeftError(f"cannot read {self.name} of {self.file}: {error}") from error

    def _bytes(self) -> np.ndarray:
        """All bytes of the tensor."""
        with open(self.file, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start, stop = json.loads(file.read(length))[self.name]["data_offsets"]
            file.seek(8 + length + start)
            return np.frombuffer(file.read(stop - start), np.uint8)


def describe_tensors(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """Shape and dtype for each name of `find_tensors`, from the headers of the files.

    Raises:
        PeftError: when a file cannot be read.
    """
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    tensors = {}
    for file in sorted(set(files.values())):
        with _opened(file) as handle:
            for name in (name for name, place in files.items() if place == file):
                header = handle.get_slice(name)
                code = header.get_dtype()
                tensors[name] = Tensor(file, name, tuple(header.get_shape()), dtypes.get(code, code))
    return tensors


def same_numbers(one: Tensor, other: Tensor, rows: int = 4096) -> bool:
    """Whether two tensors hold the same numbers, of which `rows` rows are read at a time.

    Raises:
        PeftError: when one of them cannot be read.
    """
    if one.shape != other.shape or not one.shape:
        return one.shape == other.shape and np.array_equal(one.read(()), other.read(()))
    size = one.shape[0]
    cuts = (slice(start, min(start + rows, size)) for start in range(0, size, rows))
    return all(np.array_equal(one.read((cut,)), other.read((cut,))) for cut in cuts)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, copying one tensor at a time; replaces `path` when complete.

    Views such as a transposed layer of a stack are written in C order without a copy of the whole.

    Raises:
        PeftError: for a dtype the format lacks.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest items first keeps every tensor aligned to its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_CODES:
            raise PeftError(f"cannot write {name} to {path}: safetensors has no {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as (temporary,), open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).view(np.uint8).data)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    require_file(file)
    try:
        handle = safe_open(file, framework="np")
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise PeftError(f"{file} is not a complete safetensors file: {error}") from error
    with handle:
        yield handle
