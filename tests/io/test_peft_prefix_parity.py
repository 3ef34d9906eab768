"""Prefixes exchanged with the real PEFT library: the same logits in both directions."""

import jax
import numpy as np
import pytest
from support import noisy

import peftjax as pj
from peftjax.core.errors import PeftError

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = pytest.mark.parity

IDS = np.array([[5, 3, 20, 11, 7, 2], [9, 8, 7, 4, 1, 6]])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module", params=[LLAMA3, YARN], ids=["llama3", "yarn"])
def llama(request, tmp_path_factory):
    """A random Llama with grouped heads: PEFT's side, and ours of the same folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.2,
        rope_parameters=request.param,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder, *pj.load(folder, head="causal_lm")


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS), attention_mask=torch.ones(2, 6)).logits.numpy()


def our_logits(model, params, method, frozen, trainable):
    run = pj.adapt(method.model(model))
    return run(method.apply(frozen, trainable), {"input_ids": IDS}).dense()


def assert_same(ours, wanted):
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("projection", [True, False])
def test_a_prefix_of_peft_gives_its_logits_here(llama, projection, tmp_path):
    folder, model, params = llama
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=8
    )
    theirs_adapted = peft.get_peft_model(theirs(folder), config)
    theirs_adapted.save_pretrained(tmp_path)
    adapter = pj.import_peft(tmp_path, model, params)
    wanted = logits_of(theirs_adapted)
    assert np.abs(wanted - logits_of(theirs(folder))).max() > 0.05 * np.abs(wanted).max()
    assert_same(our_logits(model, params, *adapter), wanted)


def test_a_prefix_of_ours_gives_its_logits_there(llama, tmp_path):
    folder, model, params = llama
    method = pj.prefix(length=5, mlp_size=8)
    frozen, trainable = method.init(jax.random.key(1), params)
    trainable = noisy(trainable)
    pj.export_peft(tmp_path, model, method, frozen, trainable)
    adapted = peft.PeftModel.from_pretrained(theirs(folder), tmp_path)
    assert_same(our_logits(model, params, method, frozen, trainable), logits_of(adapted))


def test_what_peft_has_no_place_for(llama, tmp_path):
    _, model, params = llama
    method = pj.prefix(length=5, layers=[0, 1])
    with pytest.raises(PeftError, match="of all 3 layers, and this one of 2"):
        pj.export_peft(tmp_path, model, method, *method.init(jax.random.key(1), params))
    with pytest.raises(PeftError, match="a prefix is written whole"):
        pj.export_peft(tmp_path, model, method, *method.init(jax.random.key(1), params), leave_out=["blocks"])
