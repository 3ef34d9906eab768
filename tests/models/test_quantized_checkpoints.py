"""Checkpoints in the formats of others, made from their definitions: bits of codes, and logits."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.models.load import lacking, load, stored_dtypes
from peftjax.models.quantized.mxfp4 import mxfp4
from peftjax.quantize.elements import E2M1
from peftjax.weights.quantized import Quantized

VALUES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float16",
}
GROUP = 32
LAYERS = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
LAYERS |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}
LAYERS |= {"mlp.down_proj": (64, 96)}


def words(codes, bits):
    """Codes along the first axis in int32 words, bit by bit from the low end, as AutoGPTQ defines them."""
    n, m = codes.shape
    stream = np.zeros((n * bits, m), np.uint8)
    for bit in range(bits):
        stream[bit::bits] = codes >> bit & 1
    stream = stream.reshape(-1, 32, m).astype(np.uint32)
    return (stream << np.arange(32, dtype=np.uint32)[:, None]).sum(1, dtype=np.uint32).view(np.int32)


def random_codes(rng, out, width, bits, symmetric, group=GROUP):
    codes = rng.integers(0, 2**bits, (out, width)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.02, (out, width // group)).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1), np.int16)
    zeros = zeros if symmetric else rng.integers(1, 2**bits, scales.shape).astype(np.int16)
    return codes, scales, zeros


def dense_of(codes, scales, zeros, group_of):
    return (codes - zeros[:, group_of].astype(np.float32)) * scales[:, group_of].astype(np.float32)


def gptq(bits=4, symmetric=True, form="gptq", act_order=False):
    def make(rng, out, width):
        codes, scales, zeros = random_codes(rng, out, width, bits, symmetric)
        group_of = np.arange(width, dtype=np.int32) // GROUP
        group_of = rng.permutation(group_of) if act_order else group_of
        stored = (zeros - (form == "gptq")).astype(np.uint8)
        parts = {
            "qweight": words(codes.T, bits),
            "qzeros": np.ascontiguousarray(words(stored, bits).T),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of,
        }
        return parts, dense_of(codes, scales, zeros, group_of)

    settings = {"bits": bits, "group_size": GROUP, "sym": symmetric, "checkpoint_format": form}
    return {"quant_method": "gptq", "desc_act": act_order, **settings}, make


def awq():
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(codes):
        n, m = codes.shape
        found = np.zeros((n, m // 8), np.uint32)
        for place, output in enumerate(order):
            found |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * place)
        return found.view(np.int32)

    def make(rng, out, width):
        codes, scales, zeros = random_codes(rng, out, width, 4, False)
        parts = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.copy()}
        return parts, dense_of(codes, scales, zeros, np.arange(width) // GROUP)

    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    }, make


def compressed(form, symmetric=True):
    def make(rng, out, width):
        if form == "float-quantized":
            weight = rng.normal(0, 10, (out, width)).astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.001, 0.002, (out, 1)).astype(ml_dtypes.bfloat16)
            return {"weight": weight, "weight_scale": scales}, weight.astype(np.float32) * scales.astype(
                np.float32
            )
        codes, scales, zeros = random_codes(rng, out, width, 4, symmetric)
        parts = {
            "weight_packed": words(codes.T, 4).T.copy(),
            "weight_scale": scales,
            "weight_shape": np.array([out, width]),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.astype(np.uint8), 4)
        return parts, dense_of(codes, scales, zeros, np.arange(width) // GROUP)

    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {}}, make


def bitsandbytes(kind, nested=True):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")

    def make(rng, out, width):
        weight = torch.from_numpy(rng.normal(0, 0.1, (out, width)).astype(np.float32))
        if kind == "int8":
            most = weight.abs().amax(1)
            codes = torch.round(weight * 127 / most[:, None]).to(torch.int8)
            parts = {"weight": codes.numpy(), "SCB": most.numpy(), "weight_format": np.zeros((), np.uint8)}
            return parts, (codes * most[:, None] / 127).numpy()
        codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        parts = {f"weight.{end}": part.numpy() for end, part in state.as_dict(packed=True).items()}
        # Not `dequantize_4bit`: on a CPU, 0.50.2 errs by more than a step where rows are no whole blocks.
        scales = state.absmax
        if nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        data = codes.numpy().reshape(-1)
        units = state.code.numpy()[np.stack([data >> 4, data & 15], -1).reshape(-1, 64)]
        return {"weight": codes.numpy(), **parts}, (units * scales.numpy()[:, None]).reshape(out, width)

    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
    return {"quant_method": "bitsandbytes", **bits}, make


FORMATS = {
    "nf4": lambda: bitsandbytes("nf4"),
    "fp4": lambda: bitsandbytes("fp4", nested=False),
    "int8": lambda: bitsandbytes("int8"),
    "gptq": lambda: gptq(),
    "gptq3": lambda: gptq(bits=3, symmetric=False),
    "gptq8_v2": lambda: gptq(bits=8, symmetric=False, form="gptq_v2"),
    "gptq_act_order": lambda: gptq(act_order=True),
    "awq": awq,
    "packed": lambda: compressed("pack-quantized"),
    "packed_affine": lambda: compressed("pack-quantized", symmetric=False),
    "float8": lambda: compressed("float-quantized"),
}
ELEMENTS = {"nf4": "Table", "fp4": "Table", "gptq3": "Natural", "gptq8_v2": "Natural", "awq": "Natural"}
ELEMENTS |= {"packed_affine": "Natural", "float8": "Float8"}


def write(folder, name, values=VALUES):
    """A checkpoint in a format; gives the tensors that a plain one would have."""
    rng = np.random.default_rng(0)
    settings, make = FORMATS[name]()
    plain = {
        "model.embed_tokens.weight": rng.normal(0, 1, (61, 64)),
        "lm_head.weight": rng.normal(0, 0.2, (61, 64)),
        "model.norm.weight": rng.uniform(0.5, 1.5, 64),
    }
    coded = {}
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{layer}.{norm}.weight"] = rng.uniform(0.5, 1.5, 64)
        for module, shape in LAYERS.items():
            parts, dense = make(rng, *shape)
            coded |= {f"model.layers.{layer}.{module}.{end}": part for end, part in parts.items()}
            plain[f"model.layers.{layer}.{module}.weight"] = dense
    plain = {key: value.astype(np.float32) for key, value in plain.items()}
    modules = tuple(f"{module}.weight" for module in LAYERS)
    rest = {key: value for key, value in plain.items() if not key.endswith(modules)}
    save_file({**rest, **coded}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))
    return plain


@pytest.fixture(scope="module")
def reference():
    """`tensors -> logits` of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**VALUES), dtype=torch.float32
    ).eval()
    ids = np.random.default_rng(1).integers(0, 61, (2, 9))

    def logits(tensors):
        model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits.numpy()

    return ids, logits


@pytest.mark.parity
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantized_weights(tmp_path, reference, name):
    plain = write(tmp_path, name)
    model, params = load(tmp_path)
    down = params["blocks"]["feed_forward"]["down"]["kernel"]
    for layer in range(2):
        dense = plain[f"model.layers.{layer}.mlp.down_proj.weight"].T
        np.testing.assert_allclose(pj.dense(down)[layer], dense, atol=1e-6)
    if name == "gptq_act_order":
        assert not isinstance(down, Quantized)
    else:
        assert isinstance(down, Quantized)
        assert type(down.codes.format.element).__name__ == ELEMENTS.get(name, "Integers")
        assert down.codes.codes.nbytes <= 2 * 64 * 96 * down.codes.format.element.bits / 8
    ids, logits = reference
    ours = jax.jit(lambda params, ids: jnp.asarray(pj.adapt(model)(params, {"input_ids": ids})))(params, ids)
    np.testing.assert_allclose(ours, logits(plain), atol=1e-4)


@pytest.mark.parity
def test_codes_of_bitsandbytes_are_those_of_nf4(tmp_path):
    """Its file and `nf4` of the same numbers give the same bits, in rows of whole blocks and of none."""
    write(tmp_path, "nf4")
    _, params = load(tmp_path, param_dtype="bfloat16")
    frozen, _ = pj.chain(pj.nf4(), pj.lora(rank=2)).init(jax.random.key(0), params)
    assert (
        frozen.params["blocks"]["attention"]["query"]["kernel"]
        is params["blocks"]["attention"]["query"]["kernel"]
    )
    assert lacking(tmp_path, load(tmp_path)[0]) == set()
    dtypes = stored_dtypes(tmp_path, load(tmp_path)[0])
    assert dtypes["blocks/attention/query/kernel"] == np.float16
    assert dtypes["head/output/kernel"] == np.float32
    with pytest.raises(PeftError, match="coded already, as nf4"):
        load(tmp_path, quantize=pj.quantized(format="int4"))


def test_what_is_not_read_is_named(tmp_path):
    write(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())

    def message(**settings):
        changed = {**config["quantization_config"], **settings}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": changed}))
        with pytest.raises(PeftError) as error:
            load(tmp_path)
        return str(error.value)

    assert "'hqq'; supported: bitsandbytes, gptq, awq, compressed-tensors" in message(quant_method="hqq")
    assert "bits=5 is not read; supported: 2, 3, 4, 8" in message(bits=5)
    assert "'marlin' is not read" in message(checkpoint_format="marlin")
    assert "'gemv' is not read" in message(quant_method="awq", version="gemv")
    assert "'nvfp4-pack' is not read" in message(quant_method="compressed-tensors", format="nvfp4-pack")
    assert "has shape" in message(bits=8)


def test_blocks_of_gpt_oss():
    """Low bits first, an exponent for 32 numbers, experts along the first axis."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 4, 2, 16)).astype(np.uint8)
    scales = rng.integers(120, 134, (3, 4, 2)).astype(np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(3, 4, 2, 32)
    dense = np.asarray(E2M1, np.float32)[codes] * 2.0 ** (scales.astype(np.float32) - 127)[..., None]
    found = mxfp4(blocks, scales, "float32")
    assert found.shape == (3, 4, 64)
    np.testing.assert_array_equal(found.decode(), dense.reshape(3, 4, 64))
    with pytest.raises(PeftError, match=r"uint8 blocks \[..., groups, 16\]"):
        mxfp4(blocks, scales[..., :1])
