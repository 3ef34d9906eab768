import jax
import numpy as np
import pytest

from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig


@pytest.fixture(scope="session")
def config():
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=12,
        initializer_range=0.2,
        labels=("no", "maybe", "yes"),
    )


@pytest.fixture(scope="session")
def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([[9], [4]])
    mask = (np.arange(9) < lengths).astype(np.int32)
    ids = rng.integers(1, 50, (2, 9)).astype(np.int32) * mask
    types = rng.integers(0, 2, (2, 9)).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.fixture(scope="session")
def classifier(config):
    """A model with a classifier, and parameters whose norms and biases are not trivial."""
    model = bert(config, head="classifier")
    leaves, treedef = jax.tree.flatten(model.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return model, treedef.unflatten(noisy)
