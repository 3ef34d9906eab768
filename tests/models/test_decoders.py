"""Decoders without torch: configurations, windows, rotations, segments, save and load."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.backbone.rope import read_rope
from peftjax.core.errors import PeftError
from peftjax.models.families import FAMILIES
from peftjax.models.load import load
from peftjax.models.save import save


def read(values):
    return FAMILIES[values["model_type"]].read_config(values)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_exact(decoder_values, random_decoder, tmp_path):
    model, params = random_decoder(decoder_values)
    save(tmp_path, model, params)
    again, loaded = load(tmp_path, head="causal_lm")
    same(loaded, params)
    assert (again.config.block, again.config.rope, again.per_layer, again.config.tied) == (
        model.config.block, model.config.rope, model.per_layer, model.config.tied
    )  # fmt: skip


def test_a_backbone_can_be_jitted_and_compared(decoders, random_decoder):
    (model, _), (again, _) = (random_decoder(decoders["gemma3"]) for _ in range(2))
    assert model == again
    assert hash(model) == hash(again)


def test_saved_config_names_the_head_saved_and_no_old_dtype(decoders, random_decoder, tmp_path):
    values = {**decoders["qwen2"], "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}
    save(tmp_path, *random_decoder(values, head="classifier"))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["Qwen2ForSequenceClassification"]
    assert "torch_dtype" not in saved


# What the families' published checkpoints rely on where their config.json says nothing.
SIZES = {
    "vocab_size": 8,
    "hidden_size": 512,
    "intermediate_size": 8,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
}
SPARSE = {
    "llama": lambda c: (c.block.kv_heads, c.block.head_width, c.tied) == (16, 32, False),
    "mistral": lambda c: (c.block.kv_heads, c.block.window, c.tied) == (8, 4096, False),
    "qwen2": lambda c: (c.block.qkv_bias, c.block.output_bias, c.windows) == (True, False, ()),
    "qwen3": lambda c: (c.block.qk_norm, c.block.head_width, c.block.qkv_bias) == (True, 128, False),
    "gemma": lambda c: (c.block.head_width, c.tied, c.embedding_scale) == (256, True, 512**0.5),
    "gemma2": lambda c: (c.block.softcap, c.logit_softcap, c.windows[:2]) == (50.0, 30.0, (4096, None)),
    "gemma3_text": lambda c: (
        (c.rope["rope_theta"], c.local_rope["rope_theta"], c.windows) == (1e6, 1e4, (*[4096] * 5, None, 4096))
    ),
}


@pytest.mark.parametrize("name", SPARSE)
def test_defaults_are_the_family_s(name):
    # The default of 32 key heads is more than this model's heads.
    heads = {"num_key_value_heads": 4} if name.startswith("qwen") else {}
    assert SPARSE[name](read({"model_type": name, **SIZES, **heads}))


def test_first_release_of_gemma_means_tanh_by_gelu():
    assert (
        read({"model_type": "gemma", **SIZES, "hidden_act": "gelu"}).block.activation == "gelu_pytorch_tanh"
    )


def test_null_window_of_mistral_is_none():
    assert read({"model_type": "mistral", **SIZES, "sliding_window": None}).block.window is None


def test_qwen_s_window_begins_at_max_window_layers():
    values = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 4}
    values |= {"use_sliding_window": True, "sliding_window": 9}
    assert read({**values, "max_window_layers": 5}).windows == (*[None] * 5, 9, 9)
    assert read({**values, "max_window_layers": 0}).block.window == 9
    assert read({**values, "use_sliding_window": False}).block.window is None


def test_gemma3_in_both_spellings(decoders):
    new = decoders["gemma3"]
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e5, "rope_local_base_freq": 1e3, "sliding_window_pattern": 3}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    configs = [read(values) for values in (new, old)]
    assert configs[0].rope == configs[1].rope
    assert configs[0].local_rope["rope_theta"] == configs[1].local_rope["rope_theta"] == 1e3
    assert configs[0].windows == configs[1].windows == (7, 7, None)


@pytest.mark.parametrize(("kind", "theta"), [("full_attention", 1e5), ("sliding_attention", 1e3)])
def test_gemma3_of_equal_layers_has_one_rotation(decoders, kind, theta):
    config = read({**decoders["gemma3"], "layer_types": [kind] * 3})
    assert config.local_rope is None
    assert config.rope["rope_theta"] == theta
    assert config.block.window == (7 if kind == "sliding_attention" else None)


ERRORS = [
    ("llama", {"rope_scaling": {"type": "ntk"}}, "rope_type 'ntk'.*longrope"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"hidden_act": "siluu"}, "'siluu'.*silu"),
    ("llama", {"num_hidden_layers": None}, "no num_hidden_layers"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads 5"),
    ("mistral", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
    ("qwen2", {"layer_types": ["full_attention"] * 6 + ["chunked_attention"]}, "'chunked_attention'"),
    ("qwen2", {"layer_types": ["full_attention"] * 6}, "6 layer_types for 7 layers"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 7}, "sliding_window must be .* not None"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "su"}}, "rope_type 'su'"),
]


@pytest.mark.parametrize(("name", "setting", "message"), ERRORS)
def test_unsupported_config_is_named(name, setting, message):
    with pytest.raises(PeftError, match=message):
        read({"model_type": name, **SIZES, **setting})


def test_longrope_factors_must_fit_the_heads(decoders, random_decoder):
    rope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    with pytest.raises(PeftError, match=r"short_factor .* has 1 numbers; head_dim 6 needs 3"):
        random_decoder({**decoders["llama2"], "rope_parameters": rope})


def test_multimodal_gemma3_names_the_text_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(PeftError, match=r"'gemma3'; supported: .*gemma3_text.*language model alone"):
        load(tmp_path)


def test_original_length_beside_the_rope_settings_goes_first():
    named = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    unnamed = {"type": "yarn", "factor": 2.0}
    trained = {"max_position_embeddings": 64}
    beside = {**trained, "original_max_position_embeddings": 32}
    read_length = lambda *given: read_rope(*given)["original_max_position_embeddings"]
    lengths = [read_length(named, beside), read_length(named, trained), read_length(unnamed, trained)]
    assert lengths == [32, 16, 64]


@pytest.mark.slow
def test_packed_segments_equal_rows_of_their_own(decoders, random_decoder):
    """Windows and two rotations; each segment's positions start again."""
    model, params = random_decoder(decoders["gemma3"])
    lengths = (80, 37, 13)
    ids = np.random.default_rng(0).integers(1, 61, (1, 130)).astype(np.int32)
    packed = {
        "input_ids": ids,
        "position_ids": np.concatenate([np.arange(n) for n in lengths])[None],
        "segment_ids": np.repeat([4, 2, 9], lengths)[None],
    }
    starts = np.cumsum([0, *lengths])
    own = np.zeros((3, 80), np.int32)
    for row, (start, length) in enumerate(zip(starts, lengths)):
        own[row, :length] = ids[0, start : start + length]
    run = jax.jit(lambda params, batch: jnp.asarray(model(params, batch)))
    together, apart = run(params, packed)[0], run(params, {"input_ids": own})
    for row, (start, length) in enumerate(zip(starts, lengths)):
        np.testing.assert_allclose(
            together[start : start + length], apart[row, :length], rtol=0, atol=1e-4 * jnp.abs(apart).max()
        )


@pytest.mark.slow
def test_a_window_of_all_layers_equals_the_same_window_by_layer(decoders, random_decoder, padded):
    """The static one skips the keys outside it, the other masks them; neither lets them through."""
    values = {**decoders["mistral"], "num_hidden_layers": 1}
    static, params = random_decoder(values)
    by_layer = FAMILIES["mistral"].build(read({**values, "sliding_window": None}), head="causal_lm")
    by_layer = dataclasses.replace(by_layer, per_layer={"window": (7,)})
    other = dict(padded, input_ids=padded["input_ids"].copy())
    other["input_ids"][1, 100] += 1
    run = lambda model, batch: np.asarray(jax.jit(lambda p: jnp.asarray(model(p, batch)))(params))[1, :110]
    outputs = run(static, padded)
    np.testing.assert_allclose(run(by_layer, padded), outputs, rtol=0, atol=1e-5 * np.abs(outputs).max())
    changed = np.abs(run(static, other) - outputs).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(100, 107))


def test_rotations_are_kept_once_and_not_per_layer(decoders, random_decoder):
    model, params = random_decoder(decoders["gemma3"])
    batch = {"input_ids": np.ones((2, 17), np.int32), "position_ids": np.ones((2, 17), np.int32)}
    summed = lambda params: jnp.asarray(model(params, batch)).sum()
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(summed, params)[1], params))
    shapes = [leaf.shape for leaf in kept]
    assert (2, 17, 5) in shapes
    assert (3, 2, 17, 5) not in shapes


@pytest.mark.slow
def test_lora_of_every_family_traces_strictly(decoder_values, random_decoder):
    """Adapters on all linear layers of models with windows, norms of queries, experts, tied output layers."""
    model, params = random_decoder(decoder_values)
    method = pj.lora(rank=2, targets="blocks/.*kernel")
    frozen, trainable = jax.eval_shape(method.init, jax.random.key(0), params)

    def loss(trainable, frozen):
        outputs = pj.adapt(model)(method.apply(frozen, trainable), {"input_ids": jnp.ones((1, 9), jnp.int32)})
        return jnp.asarray(outputs).sum()

    gradients = jax.eval_shape(jax.grad(loss), trainable, frozen)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, trainable)
