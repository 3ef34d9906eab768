"""Adapters exchanged with the real PEFT library on every kind of family: the same logits both ways."""

import jax
import numpy as np
import pytest
from support import noisy

import peftjax as pj

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = pytest.mark.parity

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TEXT, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}
# family -> (configuration, class, what PEFT is asked to adapt, what we are)
CASES = {
    "llama": (
        lambda: transformers.LlamaConfig(**LLAMA),
        "LlamaForCausalLM",
        {"target_modules": "all-linear"},
        "all-linear",
    ),
    "tied llama with its embedding": (
        lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        ["query", "embed/word"],
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=4),
        "Gemma3ForCausalLM",
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        ["query", "down"],
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32),
        "GPT2LMHeadModel",
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        "all-linear",
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(**TEXT, intermediate_size=24, max_position_embeddings=34),
        "RobertaForSequenceClassification",
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        ["query", "value"],
    ),
    "vit": (
        lambda: transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        ),
        "ViTForImageClassification",
        {"target_modules": ["q_proj", "fc2"]},
        ["query", "value", "up", "output"],
    ),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
        "T5ForConditionalGeneration",
        {"target_modules": ["q", "wo"]},
        ["query", "down"],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(folder of a random base, its class, PEFT's options, our targets, a batch)."""
    config, name, options, targets = CASES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    batch = {"input_ids": rng.integers(3, 50, (2, 9)).astype(np.int32)}
    if request.param == "vit":
        batch = {"pixel_values": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)}
    if request.param == "t5":
        batch["decoder_input_ids"] = rng.integers(3, 50, (2, 5)).astype(np.int32)
    return folder, name, options, targets, batch


def load_theirs(folder, name):
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def theirs(model, batch):
    inputs = {key: torch.tensor(value) for key, value in batch.items()}
    inputs = {key: value.long() if key.endswith("ids") else value for key, value in inputs.items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def ours(model, params, batch):
    return np.asarray(jax.jit(pj.adapt(model))(params, batch))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, np.abs(want).max()))


def test_what_we_export_computes_the_same_there(case, tmp_path):
    folder, name, _, targets, batch = case
    model, params = pj.load(folder)
    method = pj.lora(rank=4, targets=targets)
    frozen, initial = method.init(jax.random.key(0), params)
    trainable = noisy(initial, scale=0.2)
    pj.export_peft(tmp_path, model, method, frozen, trainable, base=str(folder))
    want = ours(model, method.apply(frozen, trainable), batch)
    assert np.abs(want - ours(model, params, batch)).max() > 1e-2
    close(theirs(peft.PeftModel.from_pretrained(load_theirs(folder, name), str(tmp_path)), batch), want)


def test_what_peft_saved_computes_the_same_here(case, tmp_path):
    folder, name, options, _, batch = case
    adapted = peft.get_peft_model(load_theirs(folder, name), peft.LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    model, params = pj.load(folder)
    method, frozen, trainable = pj.import_peft(tmp_path, model, params)
    close(ours(model, method.apply(frozen, trainable), batch), theirs(adapted, batch))
