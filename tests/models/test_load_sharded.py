"""Loading straight into dtype and sharding: what is read, what each device holds, and peak memory."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from support import quick_at

from peftjax.core.errors import PeftError
from peftjax.io.safetensors import Tensor, describe_tensors, find_tensors
from peftjax.models import read_parameter
from peftjax.models.load import load
from peftjax.models.read_parameter import Parameter, read_part
from peftjax.models.save import save
from peftjax.models.weight_map import TensorEntry

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module")
def folder(decoders, random_decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    values = {**decoders["qwen2"], **SIZES, "num_hidden_layers": 4}
    save(folder, *random_decoder(values))
    return folder


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


COLUMNS = ("query", "key", "value", "gate", "up")


@pytest.fixture(scope="module")
def rule(mesh):
    """Kernels over both axes of the mesh, the embeddings' rows over one, the rest on every device."""

    def sharding(path, shape):
        name = path.split("/")[-2]
        if name == "classifier":
            return NamedSharding(mesh, PartitionSpec("fsdp"))
        if path.endswith("kernel"):
            inner = ("fsdp", "tensor") if name in COLUMNS else ("tensor", "fsdp")
            return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), *inner))
        return NamedSharding(mesh, PartitionSpec("fsdp") if path.endswith("embedding") else PartitionSpec())

    return sharding


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def by_layer(mesh):
    """The layers of every stack over the mesh, as a pipeline has them."""
    return lambda path, shape: NamedSharding(
        mesh, PartitionSpec("fsdp") if path.startswith("blocks/") else PartitionSpec()
    )


@pytest.mark.parametrize("dtype", quick_at(["float32", "bfloat16"], 0))
def test_sharded_equals_unsharded_and_each_device_holds_its_part(folder, rule, dtype):
    plain = load(folder, head="causal_lm", param_dtype=dtype)[1]
    sharded = load(folder, head="causal_lm", param_dtype=dtype, sharding=rule)[1]
    same(sharded, plain)
    for path, leaf in flatten_dict(sharded, sep="/").items():
        wanted = rule(path, leaf.shape)
        assert leaf.sharding == wanted
        assert leaf.dtype == jnp.dtype(dtype)
        parts = leaf.addressable_shards
        assert len(parts) == 8
        assert {part.data.shape for part in parts} == {wanted.shard_shape(leaf.shape)}
    up = sharded["blocks"]["feed_forward"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (4, 8, 32)


def test_layers_may_be_sharded(folder, mesh):
    sharded = load(folder, head="causal_lm", sharding=by_layer(mesh))[1]
    same(sharded, load(folder, head="causal_lm")[1])
    assert sharded["blocks"]["attention"]["key"]["bias"].addressable_shards[0].data.shape == (1, 32)


def test_unsharded_arrays_are_free_to_move(folder):
    leaf = load(folder)[1]["embed"]["word"]["embedding"]
    assert not leaf.committed


def test_a_tree_of_shardings_and_a_checkpoint_of_several_files(folder, rule, tmp_path):
    plain = load(folder, head="causal_lm")[1]
    flat = flatten_dict(plain, sep="/")
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"{len(name) % 2}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tree = jax.tree.unflatten(
        jax.tree.structure(plain), [rule(path, leaf.shape) for path, leaf in sorted(flat.items())]
    )
    sharded = load(tmp_path, head="causal_lm", sharding=tree)[1]
    same(sharded, plain)
    assert all(
        leaf.sharding == rule(path, leaf.shape) for path, leaf in flatten_dict(sharded, sep="/").items()
    )
    del tree["blocks"]["attention"]
    with pytest.raises(PeftError, match=r"None for blocks/attention/\w+/\w+ \[4, "):
        load(tmp_path, head="causal_lm", sharding=tree)


def counted(monkeypatch):
    """How many numbers of each tensor are read."""
    numbers = {}
    read = Tensor.read

    def counting(self, index):
        part = read(self, index)
        numbers[self.name] = numbers.get(self.name, 0) + part.size
        return part

    monkeypatch.setattr(Tensor, "read", counting)
    return numbers


@pytest.mark.parametrize("block", [2**22, 100])
def test_each_number_is_read_once_also_where_devices_share_it(folder, rule, monkeypatch, block):
    """In one block of rows or in many."""
    monkeypatch.setattr(read_parameter, "BLOCK_NUMBERS", block)
    numbers = counted(monkeypatch)
    sharded = load(folder, head="causal_lm", sharding=rule)[1]
    tensors = load_file(folder / "model.safetensors")
    assert numbers == {name: tensor.size for name, tensor in tensors.items()}
    monkeypatch.undo()
    same(sharded, load(folder, head="causal_lm")[1])


def test_of_a_sharded_tensor_only_the_part_is_read(folder, monkeypatch):
    """One device's part of a stack of transposed kernels: a quarter of the layers, half of the columns."""
    numbers = counted(monkeypatch)
    name = "model.layers.{layer}.mlp.up_proj.weight"
    weight = TensorEntry("blocks/feed_forward/up/kernel", name, transpose=True)
    tensors = describe_tensors(find_tensors(folder))
    stack = {layer: tensors[name.format(layer=layer)] for layer in range(4)}
    index = (slice(1, 2), slice(0, 32), slice(32, 64))
    part = read_part(Parameter(weight, stack, (4, 32, 64), "float32", None), index)
    assert numbers == {name.format(layer=1): 32 * 32}
    np.testing.assert_array_equal(
        part[0], load_file(folder / "model.safetensors")[name.format(layer=1)].T[:, 32:]
    )


def test_absent_head_is_drawn_into_its_sharding(folder, rule):
    params = load(
        folder, head="classifier", num_labels=2, param_dtype="bfloat16", key=jax.random.key(0), sharding=rule
    )[1]
    kernel = params["head"]["classifier"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.sharding == rule("head/classifier/kernel", (32, 2))


def test_sharding_that_does_not_divide_is_named(folder, mesh):
    sharding = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
    with pytest.raises(PeftError, match=r"blocks/.* \[4, .*cannot be placed"):
        load(folder, head="causal_lm", sharding=lambda path, shape: sharding)


def test_a_dtype_that_numpy_lacks_is_named(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PeftError, match=rf"{name} of .* is F8_E4M3; a weight is one of .*bfloat16"):
        load(tmp_path)


MEASURE = """
import json, sys
from pathlib import Path
import jax, numpy as np
from peftjax.models.families import FAMILIES
from peftjax.models.load import load
from peftjax.models.save import save

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

folder, dtype, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
spec = lambda path, shape: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(
    *[None] * max(range(len(shape)), key=lambda axis: shape[axis]), "x"))
sharding = spec if devices > 1 else None
load(folder / "tiny", head="causal_lm", param_dtype=dtype, sharding=sharding)  # loads the libraries
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
model, params = load(folder / "large", head="causal_lm", param_dtype=dtype, sharding=sharding)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"held": held, "peak": 1024 * (kilobytes("VmHWM") - before)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("dtype", "devices"), [("float32", 1), ("bfloat16", 1), ("float32", 8)])
def test_peak_memory_is_little_more_than_the_parameters(random_decoder, tmp_path, dtype, devices):
    """A checkpoint of 285 MB in float32, its largest parameter a quarter of it."""
    sizes = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    }
    for name, values in (
        ("large", sizes),
        ("tiny", {**sizes, "num_hidden_layers": 1, "vocab_size": 8}),
    ):
        save(tmp_path / name, *random_decoder(values))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype, str(devices)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured = json.loads(run.stdout)
    assert measured["held"] > (280e6 if dtype == "float32" else 140e6)
    # A quarter of the file beside the parameters: a parameter on its way to the device, blocks of the
    # file, and what malloc keeps of those.
    file = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert measured["peak"] < measured["held"] + 0.25 * file, measured
