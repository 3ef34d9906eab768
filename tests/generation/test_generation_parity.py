"""Greedy generation against transformers, token by token, on a batch with padding."""

import numpy as np
import pytest
from tiny_decoder import padded

import peftjax as pj

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

NEW = 30


@pytest.fixture(scope="module", params=[0, 1, 2])
def tiny(request, tmp_path_factory):
    """A random Llama of transformers and its folder."""
    torch.manual_seed(request.param)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    draw = np.random.default_rng(request.param)
    return model, folder, [draw.integers(1, 97, size).tolist() for size in (11, 4, 7)]


def greedy(model, prompts, stop=None):
    """Tokens [B, NEW] of transformers, filled up with 0, and the smallest lead of a winner."""
    batch = padded(prompts)
    tensors = {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW, "eos_token_id": stop}
    made = model.generate(**tensors, **options, return_dict_in_generate=True, output_logits=True)
    tokens = made.sequences[:, batch["input_ids"].shape[1] :].numpy()
    best = torch.stack(made.logits).topk(2, dim=-1).values
    return np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1]))), float((best[..., 0] - best[..., 1]).min())


@pytest.mark.parametrize("with_stop", [False, True])
def test_greedy_tokens_are_those_of_transformers(tiny, with_stop):
    theirs, folder, prompts = tiny
    tokens, lead = greedy(theirs, prompts)
    stop = int(tokens[0, 9]) if with_stop else None
    if with_stop:
        tokens, lead = greedy(theirs, prompts, stop)
        assert tokens[0, -1] == 0
        assert (tokens[:, -1] != 0).any()  # one row ends before another
    assert lead > 1e-3  # rounding cannot decide
    lengths = [list(row).index(stop) + 1 if stop in row else NEW for row in tokens]
    model, params = pj.load(folder, head="causal_lm")
    for side in ("left", "right"):
        ours = pj.generate(
            model,
            params,
            padded(prompts, side),
            max_new_tokens=NEW,
            stop_ids=() if stop is None else (stop,),
        )
        np.testing.assert_array_equal(ours.tokens, tokens)
        np.testing.assert_array_equal(ours.lengths, lengths)
