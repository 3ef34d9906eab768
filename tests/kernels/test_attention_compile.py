"""The step of a small decoder with a platform's attention, compiled for two accelerators."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernels.targets import compiled, machine, shape

import peftjax as pj
from peftjax.backbone.attention import Visibility
from peftjax.backbone.flash_attention import flash_attend
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config
from peftjax.parallel import make_mesh

pytestmark = pytest.mark.slow
KERNELS = {"tpu": ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"), "cuda": ("__cudnn$fmha",)}
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def step(attention, target, sizes=None, batch=1, length=1024):
    """The gradients of a LoRA on rows padded behind, compiled."""
    on = None if sizes is None else make_mesh(sizes, target.devices)
    model = decoder(read_config(CONFIG), dtype="bfloat16", remat="nothing_saveable")
    model = dataclasses.replace(model, attention=attention, mesh=on)
    method = pj.lora(rank=4)
    forward = pj.adapt(method.model(model))
    key = jax.eval_shape(jax.random.key, 0)
    frozen, trainable = jax.eval_shape(lambda key: method.init(key, model.init(key)), key)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids}

    def loss(trainable, frozen, batch):
        return pj.losses.cross_entropy(forward(method.apply(frozen, trainable), batch), batch)

    place = jax.sharding.SingleDeviceSharding(target.device) if on is None else NamedSharding(on, P())
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), (trainable, frozen, batch)
    )
    traced = jax.jit(jax.grad(loss)).trace(*inputs)
    try:
        lowered = traced.lower(lowering_platforms=(target.platform,))
    except pj.PeftError as error:  # cuDNN is asked for its version
        pytest.skip(str(error))
    return lowered.compile(dict(target.options))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_step_takes_the_kernel(platform):
    target = machine(platform)
    flash, plain = (step(attention, target) for attention in ("flash", "rows"))
    assert all(name in flash.as_text() for name in KERNELS[platform])
    assert not any(name in plain.as_text() for name in KERNELS[platform])
    # Nothing of T x S numbers: no more than row blocks take, but for what the kernel keeps of each query.
    kept = 4 * 1024 * CONFIG["num_attention_heads"] * 128
    assert flash.memory_analysis().temp_size_in_bytes <= plain.memory_analysis().temp_size_in_bytes + 3 * kept


@pytest.mark.parametrize("sizes", ["fsdp=2,tensor=2", "sequence=4"])
def test_a_mesh_runs_the_kernel_on_every_device(sizes):
    text = step("flash", machine("tpu"), sizes, batch=2).as_text()
    assert "splash_mha_fwd" in text
    assert "splash_mha_dkv" in text


@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_splash_attention_of_other_heads(width):
    settings = {"scale": None, "softcap": 30.0, "sinks": None, "windows": (64, 2**31 - 1), "mesh": None}

    def loss(query, key, value, mask, segments, window):
        visible = Visibility(True, window)
        out = flash_attend(query, key, value, mask=mask, segments=segments, visible=visible, **settings)
        return jnp.sum(out.astype(jnp.float32))

    arrays = [shape(2, 600, heads, width, dtype=jnp.bfloat16) for heads in (8, 2, 2)]
    rest = shape(2, 600, dtype=jnp.bool_), shape(2, 600, dtype=jnp.int32), shape(dtype=jnp.int32)
    program = compiled(jax.grad(loss, (0, 1, 2)), (*arrays, *rest), "tpu")
    assert "splash_mha_dkv_segmented" in program.as_text()
