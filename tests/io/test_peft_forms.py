"""Adapters of PEFT's other types in files: what comes back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, noisy

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.hf.forms.table import FORMS
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.models.weight_map import embedding, linear

KEY = jax.random.key(0)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TABLE = [
    embedding("embed", "tokens"),
    *linear("blocks/up", "layers.{layer}.up"),
    *linear("blocks/down", "layers.{layer}.down"),
    *linear("head", "head"),
]


def drawn(number, *shape):
    return jnp.asarray(np.random.default_rng(number).normal(size=shape), jnp.float32)


PARAMS = {
    "embed": {"embedding": drawn(0, 20, 8)},
    "blocks": {
        "up": {"kernel": drawn(1, 3, 8, 12), "bias": drawn(2, 3, 12)},
        "down": {"kernel": drawn(3, 3, 12, 8), "bias": drawn(4, 3, 8)},
    },
    "head": {"kernel": drawn(5, 8, 2), "bias": drawn(6, 2)},
}
METHODS = {
    "one of all layers": pj.hira(rank=2, targets=["up", "down"]),
    "some layers": pj.hira(rank=2, targets=["up"], layers=[0, 2]),
    "neutral is one": pj.ia3(targets=["up", "down"], inputs=["down"], layers=[1]),
    "two ranks": pj.loha(rank=2, rank_pattern={"down": 3}, alpha_pattern={"up": 4}, targets=["up", "down"]),
    "layers of two ranks": pj.chain(
        pj.hira(rank=2, targets=["up"], layers=[0]), pj.hira(rank=3, targets=["up"], layers=[1, 2])
    ),
    "beside what is trained as it is": pj.chain(pj.oft(block=4, targets=["up"]), pj.unfreeze(["head"])),
    "arrays of the whole model": pj.vera(rank=3, targets=["up", "down"]),
    "clusters that the base tells": pj.adamss(
        rank=4, subspaces=2, subspace_rank=2, targets=["up"], layers=[0, 2]
    ),
    "a lookup table": pj.hira(rank=2, targets=["embed"]),
}


def exported(folder, method, **options):
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    pj.export_peft(folder, TABLE, method, frozen, trainable, **options)
    return method.merge(frozen, trainable)


def changed(folder, config=None, tensors=None):
    """A folder with another configuration, and with tensors that a function has changed."""
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors is not None:
        held = dict(read_tensors(find_tensors(folder / TENSORS)))
        tensors(held)
        write_tensors(folder / TENSORS, held)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_comes_back(name, tmp_path):
    merged = exported(tmp_path, METHODS[name])
    method, frozen, trainable = pj.import_peft(tmp_path, TABLE, PARAMS)
    assert_close(method.merge(frozen, trainable), merged, 1e-6)


def test_a_folder_has_the_fields_that_its_type_asks_for(tmp_path):
    exported(tmp_path, METHODS["two ranks"], base="base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LOHA"
    assert config["base_model_name_or_path"] == "base"
    assert (config["r"], config["alpha"]) in ((2, 4), (3, 16.0))
    every = {f"layers.{layer}.{name}" for layer in range(3) for name in ("up", "down")}
    assert set(config["target_modules"]) == every
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 3


WRONG = {
    "an unknown field": ({"hira_ranks": 3}, None, "sets hira_ranks.*closest"),
    "a field of another kind": ({"r": "two"}, None, "r"),
    "a module that is not there": (
        None,
        lambda held: held.update({"base_model.model.layers.0.left.hira_A": np.ones((2, 8), np.float32)}),
        "layers.0.left.*no place",
    ),
    "half of a module": (
        None,
        lambda held: held.pop("base_model.model.layers.0.up.hira_B"),
        "hira_B.*missing",
    ),
    "another width": (
        None,
        lambda held: held.update({"base_model.model.layers.0.up.hira_A": np.ones((2, 7), np.float32)}),
        "different shapes",
    ),
    "a module that is asked for": (
        {"target_modules": ["up", "head"]},
        None,
        "asks for 'head'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name, tmp_path):
    config, tensors, said = WRONG[name]
    exported(tmp_path, METHODS["one of all layers"])
    with pytest.raises(PeftError, match=said):
        pj.import_peft(changed(tmp_path, config, tensors), TABLE, PARAMS)


def test_what_a_type_has_no_form_for_is_refused(tmp_path):
    for method, said in (
        (pj.loha(rank=2, targets=["embed"]), "kind 'embedding'"),
        (pj.frod(density=0.2, targets=["up"]), "decomposes the base anew"),
        (pj.miss(rank=2, rank_pattern={"down": 3}, targets=["up", "down"]), "one for all modules"),
        (pj.chain(pj.hira(rank=2, targets=["up"]), pj.lora(rank=2, targets=["down"])), "chained with lora"),
        (
            pj.chain(
                pj.oft(block=4, targets=["up"]),
                pj.oft(block=4, targets=["down"], terms=None),
            ),
            "different options",
        ),
        (pj.chain(pj.hira(rank=2, targets=["up"]), pj.unfreeze(["up/bias"])), "no field beside"),
    ):
        with pytest.raises(PeftError, match=said):
            exported(tmp_path, method)
    assert not list(tmp_path.iterdir())


def test_shared_arrays_that_the_file_lacks_are_asked_for(tmp_path):
    exported(tmp_path, METHODS["arrays of the whole model"])
    changed(tmp_path, {"save_projection": False}, lambda held: held.pop("base_model.vera_A"))
    with pytest.raises(PeftError, match="save_projection=True"):
        pj.import_peft(tmp_path, TABLE, PARAMS)


def test_factors_that_layers_share_are_written_beside_each_module(tmp_path):
    method = pj.lily(rank=2, stride=2, experts=3, targets=["up", "down"])
    frozen, trainable = method.init(KEY, PARAMS)
    trainable = noisy(trainable)
    pj.export_peft(tmp_path, TABLE, method, frozen, trainable)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["target_modules"], config["layers_to_transform"]) == (["down", "up"], [0, 1, 2])
    assert_close(pj.import_peft(tmp_path, TABLE, PARAMS)[2], trainable)
    name = "base_model.model.layers.1.up.lily_A.weight"
    changed(tmp_path, None, lambda held: held.update({name: held[name] + 1.0}))
    with pytest.raises(PeftError, match="number 1 has factors of its own, and with a stride_A of 2"):
        pj.import_peft(tmp_path, TABLE, PARAMS)
    with pytest.raises(PeftError, match="target_modules is the pattern"):
        pj.import_peft(changed(tmp_path, {"target_modules": ".*up|.*down"}), TABLE, PARAMS)


def test_clusters_of_another_base_are_refused(tmp_path):
    exported(tmp_path, METHODS["clusters that the base tells"])
    other = jax.tree.map(lambda leaf: leaf[..., ::-1] ** 3, PARAMS)
    with pytest.raises(PeftError, match="its base is another one"):
        pj.import_peft(tmp_path, TABLE, other)


def test_every_method_of_the_table_is_registered():
    assert {form.method for form in FORMS} <= set(pj.METHODS)
