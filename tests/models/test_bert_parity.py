"""BERT against transformers: outputs and gradients in float32, and exported checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.core.errors import PeftError
from peftjax.models.load import load
from peftjax.models.minilm import minilm_path
from peftjax.models.save import save

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

# head -> (transformers class, its output, activation of the tiny random model)
CASES = {
    "none": ("BertModel", "last_hidden_state", "gelu"),
    "cls": ("BertModel", "pooler_output", "relu"),
    "classifier": ("BertForSequenceClassification", "logits", "gelu_new"),
    "masked_lm": ("BertForMaskedLM", "logits", "silu"),
}
LAYER = "encoder.layer.1."
CHOSEN = {
    "embed/word/embedding": "embeddings.word_embeddings.weight",
    "embed/position/embedding": "embeddings.position_embeddings.weight",
    "blocks/attention/query/kernel": LAYER + "attention.self.query.weight",
    "blocks/attention/key/kernel": LAYER + "attention.self.key.weight",
    "blocks/feed_forward/up/kernel": LAYER + "intermediate.dense.weight",
    "blocks/feed_forward_norm/scale": LAYER + "output.LayerNorm.weight",
}


def hf_load(name, path):
    cls = getattr(transformers, name)
    return cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=CASES)
def tiny(request, tmp_path_factory):
    """(head, folder) of a random model whose norms, biases and weights are far from trivial."""
    name, _, activation = CASES[request.param]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=12,
        hidden_act=activation,
        num_labels=3,
    )
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, folder


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def compare(folder, head, batch, vocab_size):
    """Outputs at tokens, and the gradients of a random function of them."""
    name, output, _ = CASES[head]
    hf = hf_load(name, folder)
    theirs = hf(**{key: torch.tensor(value, dtype=torch.long) for key, value in batch.items()})
    theirs = theirs[output]
    probe = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    if probe.ndim == 3:
        probe *= batch["attention_mask"][..., None]
    (theirs * torch.tensor(probe)).sum().backward()

    model, params = load(folder, head=head)

    def projected(params):
        outputs = jnp.asarray(model(params, batch))
        return jnp.sum(outputs * probe), outputs

    (_, ours), gradients = jax.jit(jax.value_and_grad(projected, has_aux=True))(params)
    close(ours * (probe != 0), theirs * torch.tensor(probe != 0))
    base = hf if name == "BertModel" else hf.bert
    named = dict(base.named_parameters())
    for path, hf_name in CHOSEN.items():
        ours = gradients
        for part in path.split("/"):
            ours = ours[part]
        ours = ours[1] if path.startswith("blocks") else ours
        close(ours.T if path.endswith("kernel") else ours, named[hf_name].grad)


def test_tiny_models_agree(tiny, batch):
    head, folder = tiny
    compare(folder, head, batch, 50)


@pytest.mark.parametrize("head", ["none", "cls"])
def test_minilm_agrees(head):
    try:
        folder = minilm_path()
    except PeftError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)
    mask = (np.arange(24) < np.array([[24], [11], [1]])).astype(np.int32)
    ids = rng.integers(1000, 30000, mask.shape).astype(np.int32) * mask
    types = rng.integers(0, 2, mask.shape).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    compare(folder, head, batch, 30522)


def test_export_gives_transformers_the_same_outputs(tiny, batch, tmp_path):
    head, folder = tiny
    name, output, _ = CASES[head]
    save(tmp_path, *load(folder, head=head))
    inputs = {key: torch.tensor(value, dtype=torch.long) for key, value in batch.items()}
    with torch.no_grad():
        before, after = (hf_load(name, path)(**inputs)[output] for path in (folder, tmp_path))
    assert torch.equal(before, after)


def test_bfloat16_stays_near_float32(tiny, batch):
    head, folder = tiny
    model, params = load(folder, head=head)
    exact = jnp.asarray(model(params, batch))
    half = dataclasses.replace(model, dtype="bfloat16")
    half = jnp.asarray(half(params, batch)).astype(jnp.float32)
    assert jnp.abs(half - exact).mean() < 0.05 * jnp.abs(exact).max()
