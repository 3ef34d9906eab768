"""Checkpoints with experts: gpt-oss's MXFP4 made from its definition, and codes of single experts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_quantized_checkpoints import GROUP, gptq
from safetensors.numpy import load_file, save_file
from support import noisy

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.families import FAMILIES
from peftjax.models.load import lacking, load, stored_dtypes
from peftjax.models.save import save
from peftjax.quantize.elements import E2M1
from peftjax.weights.quantized import Quantized

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
GPT_OSS = {
    **SIZES,
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
}
QWEN = {
    **SIZES,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 64,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
IDS = np.random.default_rng(1).integers(0, 61, (2, 9)).astype(np.int32)


def floats(folder, values):
    """A checkpoint of random numbers, and its tensors."""
    family = FAMILIES[values["model_type"]]
    model = family.build(family.read_config(values))
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0.1, 0.2, leaf.shape).astype(np.float32)
    save(folder, model, jax.tree.map(draw, model.shapes))
    return model, load_file(folder / "model.safetensors")


def write(folder, values, tensors, method=None):
    save_file(tensors, folder / "model.safetensors")
    settings = {} if method is None else {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps({**values, **settings}))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """`(folder, tensors)`: a checkpoint in MXFP4, and what its codes stand for [E, in, out]."""
    folder, rng = tmp_path_factory.mktemp("mxfp4"), np.random.default_rng(2)
    _, tensors = floats(folder, GPT_OSS)
    coded = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = rng.integers(121, 125, (experts, outputs, inputs // 32)).astype(np.uint8)
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
        dense = np.asarray(E2M1, np.float32)[codes] * 2.0 ** (scales.astype(np.float32) - 127)[..., None]
        tensors[name] = np.ascontiguousarray(dense.reshape(experts, outputs, inputs).swapaxes(1, 2))
        coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    rest = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in coded}
    write(folder, GPT_OSS, {**rest, **coded}, "mxfp4")
    return folder, tensors


def logits(model, params):
    return jax.jit(lambda params: jnp.asarray(pj.adapt(model)(params, {"input_ids": IDS})))(params)


@pytest.mark.parity
def test_logits_of_mxfp4_are_those_of_the_dequantized_weights(mxfp4):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    folder, tensors = mxfp4
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**GPT_OSS), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(*load(folder)), wanted, atol=1e-4 * np.abs(wanted).max())


def test_codes_stay_codes_are_decoded_and_written_as_floats(mxfp4, tmp_path):
    folder, tensors = mxfp4
    model, params = load(folder, param_dtype="bfloat16")
    layers = params["blocks"]["feed_forward"]["experts"]
    up = layers["up"]["kernel"]
    assert isinstance(up, Quantized)
    assert (up.shape, up.dtype) == ((2, 3, 32, 64), jnp.bfloat16)
    arrays = jax.tree.leaves(up)
    assert sum(leaf.nbytes for leaf in arrays) == np.prod(up.shape) * (1 / 2 + 1 / 32)
    joined = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(pj.dense(up)[1], joined[..., 1::2])
    np.testing.assert_array_equal(pj.dense(layers["gate"]["kernel"])[1], joined[..., ::2])
    down = tensors["model.layers.0.mlp.experts.down_proj"]
    np.testing.assert_array_equal(pj.dense(layers["down"]["kernel"])[0], down)
    _, coded = load(folder, param_dtype="bfloat16", quantize=pj.quantized(format="mxfp4"))
    assert jax.tree.structure(coded["blocks"]["feed_forward"]) == jax.tree.structure(
        params["blocks"]["feed_forward"]
    )
    assert isinstance(coded["blocks"]["attention"]["query"]["kernel"], Quantized)
    assert lacking(folder, model) == set()
    assert stored_dtypes(folder, model)["blocks/feed_forward/experts/up/kernel"] == jnp.bfloat16
    save(tmp_path, model, tree.map_named(lambda path, leaf: pj.dense(leaf), load(folder)[1]))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


@pytest.mark.slow
def test_a_step_of_lora_on_mxfp4_is_that_on_its_numbers(mxfp4):
    model, params = load(mxfp4[0])
    method = pj.lora(rank=2, targets=["query", "down"])
    trainable = method.init(jax.random.key(0), params)[1]
    dense = tree.map_named(lambda path, leaf: pj.dense(leaf), params)

    def loss(trainable, params):
        tuned = method.apply(method.init(jax.random.key(0), params)[0], trainable)
        outputs = pj.adapt(model)(tuned, {"input_ids": IDS})
        return pj.losses.cross_entropy(outputs, {"labels": jnp.asarray(IDS)})

    found, wanted = (jax.jit(jax.grad(loss))(noisy(trainable), base) for base in (params, dense))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
        assert np.abs(theirs).max() > 0


def test_matrices_of_single_experts_may_be_codes(tmp_path):
    """GPTQ's of each expert are one weight."""
    _, tensors = floats(tmp_path, QWEN)
    settings, make = gptq()
    rng, coded = np.random.default_rng(3), {}
    for name in [name for name in tensors if ".experts." in name]:
        parts, dense = make(rng, *tensors[name].shape)
        coded |= {f"{name.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
        tensors[name] = dense
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file({**rest, **coded}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "quantization_config": settings}))
    _, params = load(tmp_path)
    gate = params["blocks"]["feed_forward"]["experts"]["gate"]["kernel"]
    assert isinstance(gate, Quantized)
    assert gate.codes.group == GROUP
    wanted = tensors["model.layers.1.mlp.experts.2.gate_proj.weight"].T
    np.testing.assert_allclose(pj.dense(gate)[1, 2], wanted, atol=1e-6)


def test_a_file_may_have_the_tensors_of_a_model_in_memory(tmp_path):
    _, tensors = floats(tmp_path, QWEN)
    _, params = load(tmp_path)
    joined = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        own = f"model.layers.{layer}.mlp.experts"
        of = lambda name, own=own: np.stack([tensors[f"{own}.{n}.{name}_proj.weight"] for n in range(3)])
        joined[f"{own}.gate_up_proj"] = np.concatenate([of("gate"), of("up")], axis=1)
        joined[f"{own}.down_proj"] = of("down")
    write(tmp_path, QWEN, joined)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


@pytest.mark.slow
def test_a_part_of_the_experts_is_read_where_a_device_has_a_part(tmp_path, mxfp4):
    floats(tmp_path, GPT_OSS)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding(path, shape):
        axes = {4: (None, None, None, "x"), 3: (None, None, "x")}.get(len(shape), ())
        divided = axes if axes and shape[-1] % 2 == 0 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*divided))

    for folder in (tmp_path, mxfp4[0]):
        placed = load(folder, sharding=sharding)[1]
        jax.tree.map(np.testing.assert_array_equal, placed, load(folder)[1])
    up = placed["blocks"]["feed_forward"]["experts"]["up"]["kernel"]
    assert up.codes.codes.sharding.spec == jax.sharding.PartitionSpec(None, None, "x", None)


def test_experts_that_a_file_lacks_are_named(tmp_path):
    _, tensors = floats(tmp_path, QWEN)
    gone = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts.1.up" not in name}
    write(tmp_path, QWEN, gone)
    with pytest.raises(PeftError, match=r"layers.1.mlp.experts.up_proj of the experts \[0, 2\], and not of"):
        load(tmp_path)
    odd = "model.layers.1.mlp.experts.1.up_proj.weight"
    write(tmp_path, QWEN, {**tensors, odd: tensors[odd][:5]})
    with pytest.raises(PeftError, match=r"experts are alike"):
        load(tmp_path)
    _, tensors = floats(tmp_path, GPT_OSS)
    joined = "model.layers.0.mlp.experts.gate_up_proj"
    write(tmp_path, GPT_OSS, {**tensors, joined: tensors[joined][:, :, :60]})
    with pytest.raises(PeftError, match=r"gate_up_proj of .* has shape \[3, 30, 32\]; the model needs"):
        load(tmp_path)
    write(tmp_path, GPT_OSS, {name: tensor for name, tensor in tensors.items() if name != joined})
    with pytest.raises(PeftError, match=r"lacks 2 tensors.*layers.0.mlp.experts.(gate|up)_proj"):
        load(tmp_path)
