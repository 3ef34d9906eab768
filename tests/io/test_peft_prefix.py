"""Prefixes in the format of PEFT, without PEFT: what `import` makes of them, and contradictions."""

import json

import jax
import numpy as np
import pytest
from support import noisy
from tiny_decoder_folder import save_decoder

import peftjax as pj
from peftjax.adapters.files import load_adapter
from peftjax.cli.peft import import_saved
from peftjax.core.errors import PeftError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = save_decoder(tmp_path_factory.mktemp("base"))
    model, params = pj.load(folder, head="causal_lm")
    method = pj.prefix(length=3, mlp_size=None)
    frozen, trainable = method.init(jax.random.key(0), params)
    peft = tmp_path_factory.mktemp("peft")
    pj.export_peft(peft, model, method, frozen, noisy(trainable))
    return folder, model, params, peft


@pytest.mark.slow
def test_import_makes_an_adapter_of_it(exported, tmp_path):
    folder, model, params, peft = exported
    made = import_saved(peft, str(folder), tmp_path)
    assert (made["method"], made["head"]) == ("prefix", "causal_lm")
    read, (_, _, wanted) = load_adapter(tmp_path, params), pj.import_peft(peft, model, params)
    for got, want in zip(jax.tree.leaves(read.trainable), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_layers", 5, "num_layers 5; this model and prompt_embeddings have 2"),
        ("num_virtual_tokens", 4, "num_virtual_tokens 4; .* have 3"),
        ("token_dim", "wide", "token_dim"),
        ("num_attention_heads", -1, "num_attention_heads"),
    ],
)
def test_a_configuration_that_says_another_shape_is_refused(exported, tmp_path, name, value, error):
    _, model, params, peft = exported
    values = json.loads((peft / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, name: value}))
    (tmp_path / "adapter_model.safetensors").write_bytes((peft / "adapter_model.safetensors").read_bytes())
    with pytest.raises(PeftError, match=error):
        pj.import_peft(tmp_path, model, params)
