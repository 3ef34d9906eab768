import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peftjax.core.errors import PeftError
from peftjax.io.files import replacing
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors

TENSORS = {
    "small": np.arange(3, dtype=np.uint8),
    "bits": np.array([0, 2**32 - 1], np.uint32),
    "half": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.float64(2.5).reshape(()),
    "empty": np.zeros((0, 4), np.float16),
}


@pytest.fixture
def file(tmp_path):
    write_tensors(tmp_path / "model.safetensors", TENSORS, {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_the_library_reads_what_we_write(file):
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    read = dict(read_tensors(find_tensors(tmp_path)))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_file_is_named(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(PeftError, match=r"model\.safetensors is not a complete safetensors file"):
        find_tensors(file)


def test_corrupt_header_is_named(file):
    content = bytearray(file.read_bytes())
    content[8:12] = b"!!!!"
    file.write_bytes(content)
    with pytest.raises(PeftError, match=r"model\.safetensors"):
        find_tensors(file.parent)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(PeftError, match=r"no model.safetensors or model.safetensors.index.json"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not the index"),
        ("{}", "not the index"),
        (json.dumps({"weight_map": {"small": "absent.safetensors"}}), "absent.safetensors"),
        (json.dumps({"weight_map": {"other": "shard.safetensors"}}), "other in shard.safetensors"),
    ],
)
def test_bad_index_is_named(file, index, message):
    file.rename(file.with_name("shard.safetensors"))
    file.with_name("model.safetensors.index.json").write_text(index)
    with pytest.raises(PeftError, match=message):
        find_tensors(file.parent)


def test_failed_write_keeps_the_file_and_leaves_nothing(file):
    before = file.read_bytes()
    with pytest.raises(PeftError, match=r"complex64"):
        write_tensors(file, {"x": np.zeros(2, np.complex64)})
    with contextlib.suppress(KeyboardInterrupt), replacing(file) as (temporary,):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before
