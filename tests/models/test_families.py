"""RoBERTa, XLM-R, ViT, GPT-2 and OPT without torch: files, heads, errors, and adapters on their blocks."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.models.families import FAMILIES
from peftjax.models.load import load
from peftjax.models.save import save
from tests.support import all_but_slow, assert_no_dense_gradient, quick_at

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
IMAGE = {**TEXT, "image_size": [8, 12], "patch_size": [4, 3], "num_channels": 2}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 12, **DROPOUT}
OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 12,
    "dropout": 0.0,
}
OPT_350M = {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8}
# name -> (model_type, the other settings, a head)
CASES = {
    "roberta": ("roberta", TEXT, "classifier"),
    "xlm-roberta": ("xlm-roberta", TEXT, "masked_lm"),
    "vit": ("vit", IMAGE, "classifier"),
    "gpt2": ("gpt2", GPT2, "classifier"),
    "opt": ("opt", OPT, "causal_lm"),
    "opt-350m": ("opt", OPT_350M, "classifier"),
}


@functools.cache
def build(case, head=None):
    """The model of a case, and parameters whose norms and biases are not trivial."""
    name, settings, default = CASES[case]
    family = FAMILIES[name]
    model = family.build(family.read_config({"model_type": name, **settings}), head=head or default)
    rng = np.random.default_rng(0)
    shapes = model.shapes
    params = jax.tree.map(lambda leaf: rng.normal(0.1, 0.2, leaf.shape).astype(np.float32), shapes)
    return model, params


def make_batch(case):
    rng = np.random.default_rng(0)
    if case == "vit":
        return {"pixel_values": rng.normal(size=(2, 2, 8, 12)).astype(np.float32)}
    mask = (np.arange(7) < np.array([[7], [4]])).astype(np.int32)
    return {"input_ids": np.where(mask, rng.integers(4, 50, (2, 7)), 1), "attention_mask": mask}


def outputs(model):
    return lambda params, batch: jnp.asarray(model(params, batch))


@pytest.fixture(scope="module", params=all_but_slow(CASES, ("roberta", "vit", "opt-350m")))
def saved(request, tmp_path_factory):
    """(case, model, params, the folder they were saved in)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, params = build(request.param)
    save(folder, model, params)
    return request.param, model, params, folder


@pytest.mark.slow
def test_saved_model_comes_back_bit_exact_and_runs(saved):
    case, model, params, folder = saved
    again, loaded = load(folder, head=model.head_name)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert again.config.model_type == model.config.model_type
    assert json.loads((folder / "config.json").read_text())["model_type"] == CASES[case][0]
    result = outputs(again)(loaded, make_batch(case))
    assert bool(jnp.isfinite(result).all())
    assert float(result.std()) > 0


def test_a_second_save_writes_the_same_files(saved, tmp_path):
    _, model, _, folder = saved
    save(tmp_path, *load(folder, head=model.head_name))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_new_head_is_drawn_and_a_base_name_without_prefix_is_known(saved, tmp_path):
    case, model, params, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    prefixes = {"roberta": "roberta.", "gpt2": "transformer.", "opt": "model.", "vit": "vit."}
    prefix = prefixes[CASES[case][0].removeprefix("xlm-")]
    body = {name: tensor for name, tensor in load_file(file).items() if name.startswith(prefix)}
    save_file({name.removeprefix(prefix): tensor for name, tensor in body.items()}, file)
    if case != "opt":  # its output layer is the embedding, and its norm belongs to the body
        with pytest.raises(PeftError, match=r"no weights for head/.*pass key"):
            load(tmp_path, head=model.head_name)
    drawn = load(tmp_path, head=model.head_name, key=jax.random.key(0))[1]
    np.testing.assert_array_equal(
        drawn["blocks"]["feed_forward"]["up"]["kernel"], params["blocks"]["feed_forward"]["up"]["kernel"]
    )
    assert set(flatten_dict(drawn["head"])) == set(flatten_dict(params["head"]))


def test_names_and_axes_are_hugging_face(saved):
    case, _, params, folder = saved
    tensors, embed = load_file(folder / "model.safetensors"), params["embed"]
    if case == "vit":
        kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]
        assert kernel.shape == (16, 2, 4, 3)
        np.testing.assert_array_equal(kernel, embed["patch_conv"]["kernel"].transpose(3, 2, 0, 1))
        assert tensors["vit.embeddings.cls_token"].shape == (1, 1, 16)
        assert tensors["vit.embeddings.position_embeddings"].shape == (1, 9, 16)
    elif case == "gpt2":
        fused = params["blocks"]["attention"]["qkv"]["kernel"]
        np.testing.assert_array_equal(tensors["transformer.h.2.attn.c_attn.weight"], fused[2])
    elif case.startswith("opt"):
        assert tensors["model.decoder.embed_positions.weight"].shape == (14, 16)
        kernel = params["blocks"]["feed_forward"]["up"]["kernel"]
        np.testing.assert_array_equal(tensors["model.decoder.layers.1.fc1.weight"], kernel[1].T)


@pytest.mark.parametrize("case", quick_at(CASES, every=2))
def test_lora_adapts_all_linear_layers_without_a_dense_gradient(case):
    model, params = build(case)
    method = pj.lora(rank=2, targets="all-linear")
    leaves = tree.named_leaves(method.apply(*method.init(jax.random.key(1), params)))
    adapted = {path for path, leaf in leaves.items() if isinstance(leaf, pj.Weight)}
    wanted = {path for path in leaves if path.startswith("blocks/") and path.endswith("/kernel")}
    assert adapted == wanted | ({"embed/project_in/kernel"} if case == "opt-350m" else set())
    assert_no_dense_gradient(outputs(model), params, method, make_batch(case))


@pytest.mark.parametrize("case", quick_at(["vit", "gpt2", "opt-350m"], 0))
def test_a_step_of_lora_lowers_the_loss(case):
    model, params = build(case)
    method, batch = pj.lora(rank=2, targets="all-linear"), make_batch(case)
    frozen, trainable = method.init(jax.random.key(1), params)

    def loss(trainable, frozen):
        result = pj.adapt(outputs(model))(method.apply(frozen, trainable), batch)
        return jnp.square(result - 1.0).mean()

    step = jax.jit(jax.value_and_grad(loss))
    before, gradient = step(trainable, frozen)
    after, _ = step(jax.tree.map(lambda x, g: x - 1e-3 * g, trainable, gradient), frozen)
    assert after < before


def test_lora_on_the_patch_convolution():
    model, params = build("vit")
    method = pj.lora(rank=2, targets=["patch_conv"])
    assert_no_dense_gradient(outputs(model), params, method, make_batch("vit"))


@pytest.mark.slow
def test_mean_of_an_image_is_over_its_patches():
    (states, params), mean, batch = build("vit", "none"), build("vit", "mean")[0], make_batch("vit")
    wanted = outputs(states)(params, batch)[:, 1:].mean(1)
    np.testing.assert_allclose(outputs(mean)(params, batch), wanted, atol=1e-6)


@pytest.mark.slow
def test_an_image_model_is_drawn_without_being_told_its_inputs():
    params = jax.jit(build("vit")[0].init)(jax.random.key(0))
    kernel = params["embed"]["patch_conv"]["kernel"]
    assert kernel.shape == (4, 3, 2, 16)
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
    assert params["embed"]["position"]["embedding"].shape == (1 + 2 * 4, 16)


@pytest.mark.parametrize(
    ("case", "setting", "message"),
    [
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type.*roberta"),
        ("roberta", {"pad_token_id": None}, "roberta: positions are counted from pad_token_id"),
        ("vit", {"patch_size": 16}, r"patch_size \(16, 16\) is larger"),
        ("vit", {"num_attention_heads": 3}, "hidden_size 16 is not a multiple"),
        ("vit", {"image_size": [8]}, "image_size must be one size or"),
        ("vit", {"pooler_act": "tanhh"}, "pooler_act 'tanhh'.*tanh"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "gelu_neww"}, "activation_function 'gelu_neww'.*gelu_new"),
        ("gpt2", {"n_head": 3}, "num_attention_heads 3 does not divide hidden_size 16"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt", {"layerdrop": 0.1}, "layerdrop"),
        ("opt", {"word_embed_proj_dim": 0}, "embedding_width must be a positive integer"),
        ("opt", {"dropout": 1.0}, r"output_dropout must be a number in \[0, 1\)"),
    ],
)
def test_unsupported_settings_are_named(case, setting, message):
    family = FAMILIES[CASES[case][0]]
    with pytest.raises(PeftError, match=message):
        family.build(family.read_config({"model_type": family.name, **CASES[case][1], **setting}))


@pytest.mark.parametrize(("case", "longest"), [("roberta", 12), ("gpt2", 12), ("opt-350m", 12)])
def test_too_long_input_is_an_error_unless_positions_are_given(case, longest):
    model, params = build(case)
    ids = jnp.full((1, longest + 1), 5, jnp.int32)
    with pytest.raises(PeftError, match=f"{longest + 1} positions.*has {longest}: truncate"):
        jax.eval_shape(model, params, {"input_ids": ids})
    jax.eval_shape(model, params, {"input_ids": ids[:, 1:]})
    jax.eval_shape(model, params, {"input_ids": ids, "position_ids": ids})


def test_another_image_size_is_an_error():
    model, params = build("vit")
    with pytest.raises(PeftError, match=r"\[3, 8, 12\].*takes \[2, 8, 12\]"):
        jax.eval_shape(model, params, {"pixel_values": jnp.zeros((1, 3, 8, 12))})


@pytest.mark.parametrize("case", ["roberta", "gpt2", "vit"])
def test_unknown_head_names_the_nearest(case):
    with pytest.raises(PeftError, match=r"'clasifier'.*classifier"):
        build(case, "clasifier")
