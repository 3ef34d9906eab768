"""RoBERTa, XLM-R, ViT, GPT-2 and OPT against transformers: outputs, every gradient, exported checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from peftjax.models.load import load
from peftjax.models.save import save

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 3,
}
TEXT = {**ENCODER, "max_position_embeddings": 14, "type_vocab_size": 1}
IMAGE = {**ENCODER, "image_size": (8, 12), "patch_size": (4, 3), "num_channels": 2, "hidden_act": "gelu"}
TOKENS = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
GPT2 = {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
OPT = {
    **TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 12,
}
OPT_350M = {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8}
# name -> (configuration class, its settings, model class, our head, the output compared)
CASES = {
    "roberta": ("RobertaConfig", TEXT, "RobertaModel", "none", "last_hidden_state"),
    "roberta cls": ("RobertaConfig", {**TEXT, "hidden_act": "relu"}, "RobertaModel", "cls", "pooler_output"),
    "roberta classifier": ("RobertaConfig", TEXT, "RobertaForSequenceClassification", "classifier", "logits"),
    "roberta masked": (
        "RobertaConfig",
        {**TEXT, "hidden_act": "relu", "pad_token_id": 3},
        "RobertaForMaskedLM",
        "masked_lm",
        "logits",
    ),
    "xlm-roberta": (
        "XLMRobertaConfig",
        TEXT,
        "XLMRobertaForSequenceClassification",
        "classifier",
        "logits",
    ),
    "vit": ("ViTConfig", {**IMAGE, "qkv_bias": False}, "ViTModel", "none", "last_hidden_state"),
    "vit cls": ("ViTConfig", {**IMAGE, "pooler_output_size": 12}, "ViTModel", "cls", "pooler_output"),
    "vit classifier": ("ViTConfig", IMAGE, "ViTForImageClassification", "classifier", "logits"),
    "gpt2": ("GPT2Config", GPT2, "GPT2LMHeadModel", "causal_lm", "logits"),
    "gpt2 untied": (
        "GPT2Config",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 20, "scale_attn_weights": False},
        "GPT2LMHeadModel",
        "causal_lm",
        "logits",
    ),
    "gpt2 classifier": ("GPT2Config", GPT2, "GPT2ForSequenceClassification", "classifier", "logits"),
    "opt": ("OPTConfig", OPT, "OPTForCausalLM", "causal_lm", "logits"),
    "opt without biases": (
        "OPTConfig",
        {**OPT, "enable_bias": False, "_remove_final_layer_norm": True},
        "OPTModel",
        "none",
        "last_hidden_state",
    ),
    "opt-350m": ("OPTConfig", OPT_350M, "OPTForCausalLM", "causal_lm", "logits"),
    "opt-350m classifier": ("OPTConfig", OPT_350M, "OPTForSequenceClassification", "classifier", "logits"),
}


def hf_load(case, path):
    cls = getattr(transformers, CASES[case][2])
    return cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=CASES)
def tiny(request, tmp_path_factory):
    """(case, folder) of a random model whose norms, biases and weights are far from trivial."""
    config, settings, name, _, _ = CASES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return request.param, folder


def make_batch(case):
    """Images; or token rows that are whole, padded right, padded left, and padded on both sides."""
    rng = np.random.default_rng(0)
    if case.startswith("vit"):
        return {"pixel_values": rng.normal(size=(3, 2, 8, 12)).astype(np.float32)}
    pad = CASES[case][1].get("pad_token_id", 1)
    places = np.arange(9)
    starts, stops = np.array([[0], [0], [4], [2]]), np.array([[9], [5], [9], [7]])
    mask = ((places >= starts) & (places < stops)).astype(np.int32)
    ids = rng.integers(4, 50, mask.shape).astype(np.int32)
    return {"input_ids": np.where(mask, ids, pad).astype(np.int32), "attention_mask": mask}


def defined(case, batch, ndim):
    """Which outputs have a meaning: all, but those of a decoder before the first token, which see nothing."""
    if ndim == 2 or not case.startswith(("gpt2", "opt")):
        return True
    return (np.cumsum(batch["attention_mask"], axis=1) > 0)[..., None]


def to_torch(batch):
    return {
        name: torch.tensor(value, dtype=torch.long if value.dtype == np.int32 else torch.float32)
        for name, value in batch.items()
    }


def close(ours, theirs, floor=0.0):
    bound = 1e-4 * max(np.abs(theirs).max(), floor)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_outputs_and_every_gradient_agree(tiny, tmp_path):
    case, folder = tiny
    _, _, _, head, output = CASES[case]
    batch = make_batch(case)
    hf = hf_load(case, folder)
    theirs = hf(**to_torch(batch))[output]
    probe = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    # transformers gives a padding token's embedding no gradient, so no probe may read padding.
    if "attention_mask" in batch and probe.ndim == 3:
        probe *= batch["attention_mask"][..., None]
    elif "roberta" in case:
        probe *= batch["attention_mask"][:, :1]
    (theirs * torch.tensor(probe)).sum().backward()

    model, params = load(folder, head=head)

    @jax.jit
    def run(params, batch):
        def projected(params):
            outputs = jnp.asarray(model(params, batch))
            return jnp.sum(outputs * probe), outputs

        return jax.value_and_grad(projected, has_aux=True)(params)

    (_, ours), gradients = run(params, batch)
    close(*(np.where(defined(case, batch, probe.ndim), x, 0) for x in (ours, theirs.detach().numpy())))

    # The gradients as a checkpoint, so that they come back in our shapes and under our names.
    for parameter in hf.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    hf.save_pretrained(tmp_path)
    wanted = flatten_dict(load(tmp_path, head=head)[1], sep="/")
    gradients = flatten_dict(gradients, sep="/")
    assert wanted.keys() == gradients.keys()
    # A key's bias has no effect, so its gradient is rounding alone: hence the floor.
    floor = 0.01 * max(float(jnp.abs(leaf).max()) for leaf in wanted.values())
    for path, gradient in gradients.items():
        close(np.asarray(gradient), np.asarray(wanted[path]), floor)


def test_position_ids_agree(tiny):
    case, folder = tiny
    _, _, _, head, output = CASES[case]
    if case.startswith("vit"):
        pytest.skip("images have no position_ids")
    batch = make_batch(case)
    batch["position_ids"] = np.random.default_rng(2).integers(0, 12, (4, 9)).astype(np.int32)
    with torch.no_grad():
        theirs = hf_load(case, folder)(**to_torch(batch))[output].numpy()
    model, params = load(folder, head=head)
    ours = np.asarray(jax.jit(lambda params, batch: jnp.asarray(model(params, batch)))(params, batch))
    close(*(np.where(defined(case, batch, theirs.ndim), x, 0) for x in (ours, theirs)))


def test_export_gives_transformers_the_same_outputs(tiny, tmp_path):
    case, folder = tiny
    _, _, _, head, output = CASES[case]
    save(tmp_path, *load(folder, head=head))
    inputs = to_torch(make_batch(case))
    with torch.no_grad():
        before, after = (hf_load(case, path)(**inputs)[output] for path in (folder, tmp_path))
    assert torch.equal(before, after)
