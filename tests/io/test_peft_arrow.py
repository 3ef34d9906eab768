"""Arrow over adapters that PEFT saved: the same logits as PEFT's router, with and without GenKnowSub."""

import jax
import numpy as np
import pytest

import peftjax as pj

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

IDS = np.random.default_rng(0).integers(1, 50, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and five adapters each of which enlarges one direction most."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    folder = tmp_path_factory.mktemp("arrow")
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    for number in range(5):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=3, lora_alpha=4 + number)
        model = peft.get_peft_model(base, options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
                if "lora_A" in name:  # PEFT's power iterations find the direction where it stands out
                    parameter[0] *= 12.0
        model.save_pretrained(folder / str(number))
    return folder


def imported(folder, numbers):
    model, params = pj.load(folder / "base", head="causal_lm")
    return model, [pj.import_peft(folder / str(number), model, params) for number in numbers]


@pytest.mark.parametrize("general", [(), (3, 4)])
def test_every_token_is_routed_as_in_peft(folders, general):
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=bool(general), rng_seed=1)
    theirs = peft.create_arrow_model(
        transformers.LlamaForCausalLM.from_pretrained(folders / "base"),
        [str(folders / str(number)) for number in range(3)],
        config,
        general_adapter_paths=[str(folders / str(number)) for number in general] or None,
    ).eval()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(IDS, dtype=torch.long)).logits.numpy()
    model, adapters = imported(folders, range(5))
    chosen = {"top_k": 2, "temperature": 0.7, "general": [adapters[number] for number in general]}
    params = pj.adapters.arrow(adapters[:3], **chosen)
    run = pj.adapt(lambda params, ids: model(params, {"input_ids": ids}))
    found = np.asarray(run(params, IDS))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    alone = np.asarray(run(pj.adapters.arrow(adapters[:3], **{**chosen, "top_k": 1}), IDS))
    assert np.abs(alone - wanted).max() > 1e-3


def test_what_cannot_be_routed_says_so(folders):
    _, adapters = imported(folders, range(3))
    with pytest.raises(pj.PeftError, match="top_k is 4, and there are 3 adapters"):
        pj.adapters.arrow(adapters, top_k=4)
    params = pj.adapters.arrow(adapters, top_k=1)
    with pytest.raises(pj.PeftError, match="no merged weight"):
        params["blocks"]["attention"]["query"]["kernel"].dense()
    other = pj.lora(rank=2, targets=["value"])
    frozen, trainable = other.init(jax.random.key(0), adapters[0][1].params)
    with pytest.raises(pj.PeftError, match="is adapted by some of the adapters only"):
        pj.adapters.arrow([adapters[0], (other, frozen, trainable)], top_k=1)
