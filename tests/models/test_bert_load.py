import json
import logging
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from support import quick_at

from peftjax.core.errors import PeftError
from peftjax.models.bert import WEIGHTS
from peftjax.models.bert_config import BertConfig, read_config, write_config
from peftjax.models.load import load
from peftjax.models.read_weights import read_weights
from peftjax.models.save import save
from peftjax.models.weight_map import TensorEntry, linear, to_hf


@pytest.fixture(scope="session")
def saved(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, *classifier)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the checkpoint, to be spoilt."""
    return shutil.copytree(saved, tmp_path / "copy")


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_exact(classifier, saved):
    model, params = load(saved, head="classifier")
    assert model == classifier[0]
    same(params, classifier[1])


def test_names_and_orientation_are_hugging_face(classifier, saved):
    tensors, params = load_file(saved / "model.safetensors"), classifier[1]
    kernel = params["blocks"]["feed_forward"]["up"]["kernel"]
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    np.testing.assert_array_equal(tensors[name], kernel[1].T)
    assert len(tensors) == 5 + 3 * 16 + 4
    assert json.loads((saved / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


@pytest.mark.parametrize("source", quick_at([np.float32, np.float16, jnp.bfloat16], every=2))
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_param_dtype_is_one_rounding_of_the_file(folder, source, target):
    rewrite(folder, lambda tensors: {k: v.astype(source) for k, v in tensors.items()})
    tensors = load_file(folder / "model.safetensors")
    params = load(folder, head="classifier", param_dtype=target)[1]
    expected = tensors["bert.embeddings.word_embeddings.weight"].astype(jnp.dtype(target))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(target)}
    np.testing.assert_array_equal(params["embed"]["word"]["embedding"], expected)


def test_bfloat16_parameters_round_trip(classifier, saved, tmp_path):
    model, params = load(saved, head="classifier", param_dtype="bfloat16")
    save(tmp_path / "half", model, params)
    same(load(tmp_path / "half", head="classifier", param_dtype="bfloat16")[1], params)


def test_sharded_unprefixed_and_old_names(classifier, folder):
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    names = sorted(old)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: old[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    same(load(folder, head="classifier")[1], classifier[1])


def test_reading_holds_one_tensor_beside_the_result(folder):
    shapes = {"a/kernel": (8, 300, 200), "b/kernel": (200, 300)}
    table = (TensorEntry("a/kernel", "a.{layer}.weight", transpose=True), *linear("b", "b"))
    tensors = {f"a.{i}.weight": np.full((200, 300), i, np.float32) for i in range(8)}
    save_file({**tensors, "b.weight": np.ones((300, 200), np.float32)}, folder / "m.safetensors")
    specs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    del tensors
    tracemalloc.start()
    loaded = read_weights(
        folder / "m.safetensors", unflatten_dict(specs, sep="/"), table,
        dtype="bfloat16", canonical=str, ignored="", task_weights=None,
    )  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in loaded.params.values())
    assert peak < result + 2.5 * 4 * 300 * 200
    np.testing.assert_array_equal(loaded.params["a/kernel"][:, 0, 0], np.arange(8))


def test_absent_classifier_is_drawn_and_logged(folder, caplog):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("classifier")})
    with pytest.raises(PeftError, match=r"head/classifier/kernel.*pass key"):
        load(folder, head="classifier")
    with caplog.at_level(logging.INFO):
        params = load(folder, head="classifier", num_labels=5, key=jax.random.key(0))[1]
    assert params["head"]["classifier"]["kernel"].shape == (16, 5)
    assert "head/classifier/bias, head/classifier/kernel" in caplog.text
    assert "head/pooler" not in caplog.text
    assert jnp.abs(params["head"]["classifier"]["kernel"]).max() > 0


def test_masked_lm_head_is_drawn_as_a_whole(saved):
    params = load(saved, head="masked_lm", key=jax.random.key(0))[1]
    assert set(flatten_dict(params["head"], sep="/")) == {
        "transform/kernel", "transform/bias", "norm/scale", "norm/bias", "bias"
    }  # fmt: skip


def test_mean_classifier_round_trips(saved, tmp_path):
    model, params = load(saved, head="mean_classifier")
    assert set(params["head"]) == {"classifier"}
    save(tmp_path / "mean", model, params)
    same(load(tmp_path / "mean", head="mean_classifier")[1], params)


def test_unused_tensors_are_named_in_a_warning(saved, caplog):
    with caplog.at_level(logging.WARNING):
        params = load(saved, head="none")[1]
    assert params["head"] == {}
    assert "classifier.weight" in caplog.text
    assert "bert.pooler.dense.bias" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["bert.encoder.layer.2.output.dense.weight", "bert.pooler.dense.weight", "classifier.bias"],
)
def test_missing_tensor_is_named(folder, name):
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(PeftError, match=f"{folder}.*{name}"):
        load(folder, head="classifier", key=jax.random.key(0))


def test_missing_pooler_is_never_drawn_for_a_head_without_a_classifier(folder):
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k})
    with pytest.raises(PeftError, match=r"bert.pooler.dense"):
        load(folder, head="cls", key=jax.random.key(0))


def test_wrong_shape_names_file_and_tensor(folder):
    with pytest.raises(PeftError, match=r"classifier\.\w+ of .*safetensors has shape \[3.*needs \[2"):
        load(folder, head="classifier", num_labels=2)


def test_integer_weights_are_an_error(folder):
    rewrite(folder, lambda t: {**t, "classifier.bias": t["classifier.bias"].astype(np.int8)})
    with pytest.raises(PeftError, match=r"classifier.bias of .* is int8"):
        load(folder, head="classifier")


def test_two_spellings_of_one_tensor_are_an_error(folder):
    name = "embeddings.LayerNorm.bias"
    rewrite(folder, lambda tensors: {**tensors, name: tensors[f"bert.{name}"]})
    with pytest.raises(PeftError, match=r"holds both"):
        load(folder)


def test_labels_are_for_labeled_heads(saved):
    with pytest.raises(PeftError, match=r"'mean' takes no num_labels.*mean_classifier"):
        load(saved, head="mean", num_labels=2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "albert"}, "'albert'; supported: bert"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type.*'absolute'"),
        ({"hidden_act": "gelu_neww"}, "'gelu_neww'.*gelu_new"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": 15}, "hidden_size 15"),
        ({"hidden_size": "16"}, "'hidden_size': Expected `int`, got `str`"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps"),
    ],
)
def test_unsupported_config_is_named(folder, setting, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    with pytest.raises(PeftError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_unreadable_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(PeftError, match=r"config\.json"):
        load(folder)


def test_absent_folder_is_named(tmp_path):
    with pytest.raises(PeftError, match=r"nowhere.config\.json"):
        load(tmp_path / "nowhere")


def test_config_round_trip_keeps_label_names(config):
    assert read_config(write_config(config)) == config
    assert read_config({}) == BertConfig()


def test_export_of_an_unknown_parameter_is_named():
    with pytest.raises(PeftError, match=r"head/adapter"):
        to_hf({"head": {"adapter": np.zeros((2, 3))}}, WEIGHTS)


def test_failed_save_keeps_the_old_checkpoint(classifier, folder):
    model, params = classifier
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    complex_params = jax.tree.map(lambda x: x.astype(jnp.complex64), params)
    with pytest.raises(PeftError, match=r"complex64"):
        save(folder, model, complex_params)
    lost = {**params, "head": {"pooler": params["head"]["pooler"]}}
    with pytest.raises(PeftError, match=r"head/classifier/bias has shape None"):
        save(folder, model, lost)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
