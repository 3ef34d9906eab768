"""Decoders against transformers: logits and every gradient in float32, rotations, exported checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from peftjax.backbone.rope import FREQUENCIES, read_rope, rotation
from peftjax.models.load import load
from peftjax.models.save import save

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

CLASSES = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "classifier": transformers.AutoModelForSequenceClassification,
    "none": transformers.AutoModel,
}


def make(folder, values, head):
    """Save a random model whose norms, biases and weights are far from trivial."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**values, num_labels=3)
    hf = CLASSES[head].from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    hf.save_pretrained(folder)


def hf_load(folder, head):
    return CLASSES[head].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def outputs(hf, batch):
    result = hf(
        **{name: torch.tensor(value, dtype=torch.long) for name, value in batch.items()}, use_cache=False
    )
    return result["logits"] if "logits" in result else result["last_hidden_state"]


@pytest.fixture(scope="module")
def folder(decoder_values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    make(folder, decoder_values, "causal_lm")
    return folder


def close(ours, theirs, scale=0.0):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(np.abs(theirs).max(), scale))


def test_logits_and_gradients(folder, padded, tmp_path):
    """130 padded tokens with positions from the mask; every gradient of a random sum of the logits."""
    mask = padded["attention_mask"]
    batch = {**padded, "position_ids": np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)}
    hf = hf_load(folder, "causal_lm")
    theirs = outputs(hf, batch)
    probe = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32) * mask[..., None]
    (theirs * torch.tensor(probe)).sum().backward()
    model, params = load(folder, head="causal_lm")

    def projected(params):
        logits = jnp.asarray(model(params, batch))
        return jnp.sum(logits * probe), logits

    (_, ours), gradients = jax.jit(jax.value_and_grad(projected, has_aux=True))(params)
    close(ours * (probe != 0), theirs * torch.tensor(probe != 0))
    # As a checkpoint, whose tensors may be others than those of a model in memory.
    for parameter in hf.parameters():
        parameter.data = parameter.grad
    hf.save_pretrained(tmp_path)
    wanted = flatten_dict(load(tmp_path, head="causal_lm")[1], sep="/")
    gradients = flatten_dict(gradients, sep="/")
    assert gradients.keys() == wanted.keys()
    largest = max(float(jnp.abs(gradient).max()) for gradient in wanted.values())
    for path, gradient in wanted.items():
        close(gradients[path], torch.tensor(np.asarray(gradient)), scale=1e-3 * largest)


@pytest.mark.parametrize("decoder_values", ["llama3", "qwen2", "gemma3"], indirect=True)
def test_classifier_reads_the_last_token(decoder_values, padded, tmp_path):
    """Default positions; padding on either side, found by the padding token."""
    batch = {name: array[:, :14] for name, array in padded.items()}
    batch["input_ids"] = np.where(np.arange(14) < [[14], [11]], batch["input_ids"], 0)
    batch["attention_mask"] = (batch["input_ids"] != 0).astype(np.int32)
    make(tmp_path, decoder_values, "classifier")
    with torch.no_grad():
        theirs = outputs(hf_load(tmp_path, "classifier"), batch)
    model, params = load(tmp_path, head="classifier")
    close(jax.jit(model)(params, batch), theirs)


@pytest.mark.parametrize("decoder_values", ["mistral", "gemma3"], indirect=True)
def test_packed_rows(folder):
    """Segments with positions that start again, which transformers finds in the positions alone."""
    ids = np.random.default_rng(0).integers(1, 61, (1, 40)).astype(np.int32)
    positions = np.concatenate([np.arange(17), np.arange(14), np.arange(9)])[None]
    segments = np.repeat([1, 2, 3], [17, 14, 9])[None]
    with torch.no_grad():
        theirs = outputs(hf_load(folder, "causal_lm"), {"input_ids": ids, "position_ids": positions})
    model, params = load(folder, head="causal_lm")
    batch = {"input_ids": ids, "position_ids": positions, "segment_ids": segments}
    close(jnp.asarray(jax.jit(model)(params, batch)), theirs)


def test_export_gives_transformers_the_same_logits(folder, padded, tmp_path):
    compare_export(folder, tmp_path, "causal_lm", padded)


@pytest.mark.parametrize("decoder_values", ["llama3", "gemma3"], indirect=True)
@pytest.mark.parametrize("head", ["classifier", "none"])
def test_export_of_other_heads(decoder_values, padded, head, tmp_path):
    make(tmp_path / "theirs", decoder_values, head)
    compare_export(tmp_path / "theirs", tmp_path / "ours", head, padded)


def compare_export(theirs, ours, head, batch):
    save(ours, *load(theirs, head=head))
    with torch.no_grad():
        before, after = (outputs(hf_load(path, head), batch) for path in (theirs, ours))
    assert torch.equal(before, after)


FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7, 2.0], "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0]}
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
     "mscale_all_dim": 1.2, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.9},
    {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS},
    {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 3.0, **FACTORS},
    {"rope_type": "longrope", "original_max_position_embeddings": 32, "attention_factor": 1.5, **FACTORS},
]  # fmt: skip


def test_every_rope_type_is_compared():
    assert {rope["rope_type"] for rope in ROPES} == set(FREQUENCIES)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("length", [20, 130])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotation(decoders, rope, length, spelling):
    """Cosines and sines, of lengths within and beyond the trained 64, in both spellings."""
    values = {**decoders["llama2"], "head_dim": 10, "rope_theta": 5000.0}
    key = "type" if spelling == "rope_scaling" else "rope_type"
    settings = {key if name == "rope_type" else name: value for name, value in rope.items()}
    config = transformers.AutoConfig.for_model(**values, **{spelling: settings})
    hf = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = np.stack([np.arange(length), np.maximum(np.arange(length) - 5, 0)])
    theirs = hf(torch.zeros(1), torch.tensor(positions))
    ours = rotation(jnp.asarray(positions), 10, read_rope(settings, values), 64)
    for part, wanted in zip(ours, theirs):
        np.testing.assert_allclose(part, wanted[..., :5], rtol=0, atol=2e-5)
