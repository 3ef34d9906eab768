"""Files of PEFT's types by the table of forms: what is written is read again, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import noisy

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.models.weight_map import linear, norm

KEY = jax.random.key(0)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TABLE = [
    *linear("blocks/up", "layers.{layer}.up"),
    *linear("blocks/down", "layers.{layer}.down"),
    *norm("blocks/norm", "layers.{layer}.norm"),
]
SHAPES = {
    "up": {"kernel": (3, 8, 12), "bias": (3, 12)},
    "down": {"kernel": (3, 12, 8), "bias": (3, 8)},
    "norm": {"scale": (3, 8), "bias": (3, 8)},
}
PARAMS = {
    "blocks": {
        module: {
            name: jnp.asarray(np.random.default_rng(len(name)).normal(size=shape), jnp.float32)
            for name, shape in own.items()
        }
        for module, own in SHAPES.items()
    }
}
WHERE = {"targets": ["up", "down"], "layers": [0, 2]}
METHODS = [
    pj.lokr(rank=1, decompose_both=True, rank_pattern={"up": 4}, **WHERE),
    pj.hra(rank=2, **WHERE),
    pj.road(variant=4, group=4, **WHERE),
    pj.boft(block=2, rounds=2, **WHERE),
    pj.c3a(block=4, **WHERE),
    pj.fourierft(count=7, seed=3, **WHERE),
    pj.waveft(count=7, **WHERE),
    pj.gralora(rank=4, general=2, **WHERE),
    pj.bone(rank=4, **WHERE),
    pj.beft(**WHERE),
    pj.deft(rank=2, alpha=3.0, **WHERE),
    pj.peanut(rank=2, depth=1, activation="tanh", **WHERE),
    pj.glora(rank=2, **WHERE),
    pj.supertuning(sparsity=0.9, rank=2, **WHERE),
    pj.ln_tuning(),
    pj.alora(rank=2, invocation_tokens=[3, 4], rslora=True, **WHERE),
    pj.bdlora(rank=2, blocks=2, side_pattern={"blocks/down": "inputs"}, **WHERE),
    pj.bdlora(rank=4, blocks=2, side_pattern={"down": "none"}, alpha_pattern={"up": 3.0}, **WHERE),
    pj.kasa(rank=2, beta=0.5, targets=["up"]),
    pj.mica(rank=2, targets=["down"]),
    pj.monteclora(rank=2, samples=3, noise=0.5, **WHERE),
    pj.velora(rank=2, groups=3, direction="fixed", dropout=0.25, **WHERE),
    pj.velora(rank=2, groups=5, strength=0.5, **WHERE),
]


def made(method):
    frozen, trainable = method.init(KEY, PARAMS)
    return frozen, noisy(trainable)


def exported(folder, method):
    frozen, trainable = made(method)
    pj.export_peft(folder, TABLE, method, frozen, trainable)
    return trainable


def tensors_of(folder):
    return dict(read_tensors(find_tensors(folder / TENSORS)))


def rewrite(folder, *, without=(), **fields):
    """The adapter without some tensors and with other fields."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    tensors = {name: own for name, own in tensors_of(folder).items() if not name.endswith(tuple(without))}
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})


def arrays_of(method, trainable):
    """All trained arrays by path, of one method or of the methods of a chain."""
    parts = list(trainable.values()) if pj.describe(method)["name"] == "chain" else [trainable]
    return {path: own for part in parts for path, own in part.items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_is_written_is_read_again(method, tmp_path):
    wanted = exported(tmp_path / "first", method)
    again, frozen, trainable = pj.import_peft(tmp_path / "first", TABLE, PARAMS)
    jax.tree.map(np.testing.assert_allclose, arrays_of(again, trainable), wanted)
    parts = pj.describe(again).get("methods", [pj.describe(again)])
    assert {part["name"] for part in parts} == {method.name}
    if len(parts) == 1:  # PEFT has one configuration for modules of other sizes
        pj.export_peft(tmp_path / "second", TABLE, again, frozen, trainable)
        first, second = (tensors_of(tmp_path / name) for name in ("first", "second"))
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        (pj.lokr(rank=1, targets=["up"]), {"without": ["0.up.lokr_w1"]}, "up.lokr_w1_b' is missing"),
        (pj.lokr(rank=1, targets=["up"]), {"decompose_factor": 2}, "of 'blocks/up/kernel' has shape"),
        (pj.lokr(rank=1, targets=["up"]), {"decompose_both": True}, "do not fit"),
        (pj.hra(rank=2, targets=["up"]), {"without": ["0.up.hra_u"]}, "asks for 'layers.0.up'"),
        (pj.waveft(count=5, targets=["up"]), {"wavelet_family": "db2"}, "wavelets 'db2'"),
        (
            pj.supertuning(sparsity=0.9, targets=["up"]),
            {"save_precomputed_indices": False},
            "save_precomputed_indices=True",
        ),
        (pj.peanut(rank=2, targets=["up"]), {"act_fn": "mish"}, "act_fn 'mish'"),
        (pj.boft(targets=["up"]), {"boft_dropout": 0.1}, "boft_dropout 0.1"),
        (
            pj.monteclora(rank=2, targets=["up"]),
            {"monteclora_config": {"num_samples": 8, "use_entropy": True}},
            "has use_entropy",
        ),
        (pj.kasa(rank=2, targets=["up"]), {"init_lora_weights": "pissa"}, "which kasa has not"),
        (pj.kasa(rank=2, targets=["up"]), {"velora_config": {}, "use_dora": True}, "sets use_dora"),
        (pj.bdlora(rank=2, targets=["up"]), {"use_bdlora": {"nblocks": 2}}, "do not fit|has shape"),
        (pj.ln_tuning(), {"without": ["1.norm.ln_tuning_layers.bias"]}, "layers.1.norm.bias' is missing"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_cannot_be_read_says_why(method, changes, said, tmp_path):
    exported(tmp_path, method)
    rewrite(tmp_path, **changes)
    with pytest.raises(PeftError, match=said):
        pj.import_peft(tmp_path, TABLE, PARAMS)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (pj.hra(rank=3, orthogonal=True, targets=["up"]), "reflected back in the directions of the start"),
        (pj.gralora(rank=2, rank_pattern={"up": 4}, **WHERE), "has one for all modules"),
        (pj.chain(pj.hra(rank=2, targets=["up"]), pj.bone(rank=4, targets=["down"])), "no form for"),
    ],
    ids=["hra", "gralora", "chain"],
)
def test_what_cannot_be_written_says_why(method, said, tmp_path):
    with pytest.raises(PeftError, match=said):
        exported(tmp_path, method)


def test_norms_are_written_beside_another_adapter(tmp_path):
    frozen, trainable = made(method := pj.chain(pj.bone(rank=4, targets=["up"]), pj.ln_tuning()))
    pj.export_peft(tmp_path, TABLE, method, frozen, trainable)
    again, _, read = pj.import_peft(tmp_path, TABLE, PARAMS)
    jax.tree.map(np.testing.assert_allclose, read["bone"], trainable["bone"])
    jax.tree.map(np.testing.assert_allclose, read["unfreeze"], trainable["ln_tuning"])
    assert again.name == "chain"
