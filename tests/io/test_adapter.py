"""Adapters to and from a folder."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_close, noisy, quick_at

import peftjax as pj
from peftjax.adapters.files import CONFIG, TENSORS, load_adapter, save_adapter
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors


def make_params(width=8, layers=3):
    keys = jax.random.split(KEY, 2)
    return {
        "blocks": {"up": {"kernel": jax.random.normal(keys[0], (layers, width, width))}},
        "head": {"kernel": jax.random.normal(keys[1], (width, 2)), "bias": jnp.zeros(2)},
    }


PARAMS = make_params()
METHODS = [
    pj.lora(rank=2),
    pj.lora_fa(rank=2),
    pj.dora(rank=2),
    pj.pissa(rank=2, iterations=2),
    pj.chain(pj.lora(rank=2, rank_pattern={"up": 3}), pj.unfreeze(["head"])),
]


@pytest.mark.parametrize("method", quick_at(METHODS, every=2), ids=lambda m: m.name)
def test_round_trip_is_exact(method, tmp_path):
    frozen, trainable = method.init(jax.random.key(3), PARAMS)
    trainable = noisy(trainable)
    save_adapter(tmp_path, method, frozen, trainable, seed=3, info={"labels": ["a", "b"]})
    loaded = load_adapter(tmp_path, PARAMS)
    assert_close(loaded.trainable, trainable, 0)
    assert_close(loaded.method.merge(loaded.frozen, loaded.trainable), method.merge(frozen, trainable), 0)
    assert loaded.info == {"labels": ["a", "b"]}


def test_the_folder_holds_the_adapter_and_nothing_else(tmp_path):
    method = pj.lora(rank=8)
    params = make_params(width=256)
    frozen, trainable = method.init(KEY, params)
    save_adapter(tmp_path, method, frozen, trainable, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 1.05 * tree.nbytes(trainable)


def test_names_that_contain_each_other_do_not_leak(tmp_path):
    params = {name: {"kernel": jnp.ones((4, 4))} for name in ("a", "aa", "lora", "weight")}
    method = pj.lora(rank=1)
    frozen, trainable = method.init(KEY, params)
    trainable = noisy(trainable)
    save_adapter(tmp_path, method, frozen, trainable, seed=0)
    assert_close(load_adapter(tmp_path, params).trainable, trainable, 0)


@pytest.fixture
def saved(tmp_path):
    method = METHODS[0]
    frozen, trainable = method.init(KEY, PARAMS)
    save_adapter(tmp_path, method, frozen, trainable, seed=0)
    return tmp_path


EARLIER = {
    "galore": (pj.galore(rank=2), ("weight", "p", "q")),
    "snella": (pj.snella(rank=2, total_steps=10), ("sparsity",)),
    "sara": (pj.sara(density=0.25), ("keep",)),
    "chain": (pj.chain(pj.snella(rank=2, total_steps=10), pj.unfreeze(["head"])), ("sparsity",)),
}


@pytest.mark.parametrize("name", quick_at(EARLIER, every=2))
def test_an_adapter_of_an_earlier_version_is_loaded(name, tmp_path):
    """What a method changes by itself lay beside what it trains, all of it float32; SaRA's limit nowhere."""
    method, beside = EARLIER[name]
    frozen, trainable = method.init(jax.random.key(3), PARAMS)
    trainable = noisy(trainable)
    held = tree.map_named(
        lambda path, leaf: leaf / 2 if path.rsplit("/", 1)[1] in ("weight", "p", "q", "sparsity") else leaf,
        frozen.state,
    )
    frozen = replace(frozen, state=held)
    save_adapter(tmp_path, method, frozen, trainable, seed=3)
    tensors, moved = {}, 0
    for path, tensor in read_tensors(find_tensors(tmp_path / TENSORS)):
        slot = path.rsplit("/", 1)[1]
        if slot in beside:
            tensors[path.replace("state/", "trainable/", 1)] = np.asarray(tensor, np.float32)
            moved += 1
        elif slot != "limit":
            tensors[path] = np.asarray(tensor)
    assert moved
    write_tensors(tmp_path / TENSORS, tensors)
    loaded = load_adapter(tmp_path, PARAMS)
    assert_close((loaded.trainable, loaded.frozen.state), (trainable, frozen.state), 0)
    dtypes = lambda state: jax.tree.map(lambda leaf: leaf.dtype, state)
    assert dtypes(loaded.frozen.state) == dtypes(frozen.state)
    assert_close(loaded.method.merge(loaded.frozen, loaded.trainable), method.merge(frozen, trainable), 0)


def test_another_models_adapter_is_refused(saved):
    with pytest.raises(PeftError, match=r"'trainable/blocks/up/kernel/a' has shape \(3, 2, 8\)"):
        load_adapter(saved, make_params(layers=2))


@pytest.mark.parametrize("damage", ["truncate", "no tensors", "no config", "not JSON", "no method"])
def test_damaged_folders_are_named(saved, damage):
    tensors, config = saved / TENSORS, saved / CONFIG
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "not JSON":
        config.write_text("{")
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "method": {"name": "lorra"}}))
    with pytest.raises(PeftError, match=r"adapter|lora"):
        load_adapter(saved, PARAMS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "0"),
        ("seed", None),
        ("seed", 2**70),
        ("info", []),
        ("method", 3),
        ("method", {"name": []}),
        ("method", {"name": "lora", "rank": "4"}),
        ("method", {"name": "lora", "rank": {}}),
        ("method", {"name": "lora", "targets": "(", "rank": 2}),
        ("method", {"name": "lora", "targets": 7}),
        ("method", {"name": "lora", "alpha": []}),
        ("method", {"name": "chain", "methods": 5}),
    ],
)
def test_wrong_values_are_named_with_the_file(saved, field, value):
    config = saved / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(PeftError, match=rf"{CONFIG}.*{field}|{CONFIG}: (lora|chain|the pattern)"):
        load_adapter(saved, PARAMS)


def test_a_failed_write_leaves_the_old_adapter(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    method = METHODS[0]
    frozen, trainable = method.init(KEY, PARAMS)
    unwritable = jax.tree.map(lambda leaf: leaf.astype(jnp.float8_e4m3fn), trainable)
    with pytest.raises(PeftError, match="no float8_e4m3fn"):
        save_adapter(saved, method, frozen, unwritable, seed=0)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_wrong_option_in_adapter_json_is_one_sentence_that_names_it(tmp_path):
    method = pj.lora(rank=2)
    save_adapter(tmp_path, method, *method.init(KEY, PARAMS), seed=0)
    file = tmp_path / CONFIG
    config = json.loads(file.read_text())
    for option, value, message in (
        ("rank", "2", r"lora: option 'rank': Expected `int`, got `str` \('2'\)"),
        ("rank", 10**30, "lora: option 'rank'"),
        ("layers", {"a": 1}, "lora: option 'layers'"),
        ("layouts", {"up": 3}, r"lora: option 'layouts': .*Expected `str`, got `int` \({'up': 3}\)"),
        ("bias", None, "lora: option 'bias' is None, and can be 'none', 'adapted'"),
    ):
        file.write_text(json.dumps({**config, "method": {**config["method"], option: value}}))
        with pytest.raises(PeftError, match=f"{CONFIG}: {message}"):
            load_adapter(tmp_path, PARAMS)
