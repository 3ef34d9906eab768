"""Models with experts against transformers: greedy generation with padding, and the routers' balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import all_but_slow
from tiny_decoder import padded

import peftjax as pj
from peftjax.backbone.router_logits import with_router_logits

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

NEW = 20
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 3, "intermediate_size": 24, "max_position_embeddings": 128, "head_dim": 8}
SIZES |= {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
CASES = {
    "GptOss": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@pytest.fixture(scope="module", params=all_but_slow(CASES, ("GptOss",)))
def tiny(request, tmp_path_factory):
    """A random model of transformers, with sinks and biases that are not zero, and its folder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **CASES[request.param])
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    draw = np.random.default_rng(0)
    return model, folder, [draw.integers(1, 97, size).tolist() for size in (11, 4, 7)]


def test_greedy_tokens_are_those_of_transformers(tiny):
    theirs, folder, prompts = tiny
    batch = padded(prompts)
    tensors = {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    made = theirs.generate(**tensors, **options, return_dict_in_generate=True, output_logits=True)
    best = torch.stack(made.logits).topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-3  # rounding cannot decide
    model, params = pj.load(folder, head="causal_lm")
    ours = pj.generate(model, params, batch, max_new_tokens=NEW)
    np.testing.assert_array_equal(ours.tokens, made.sequences[:, batch["input_ids"].shape[1] :].numpy())


def test_router_logits_and_their_balance_are_those_of_transformers(tiny):
    theirs, folder, prompts = tiny
    batch = padded(prompts, "right")
    tensors = {name: torch.tensor(rows, dtype=torch.long) for name, rows in batch.items()}
    with torch.no_grad():
        outputs = theirs(**tensors, output_router_logits=True, use_cache=False)
    model, params = pj.load(folder, head="causal_lm")
    chosen, mask = model.block.config.experts.chosen, jnp.asarray(batch["attention_mask"])

    def run(params):
        logits = with_router_logits(model)(params, batch)[1]
        return (
            logits,
            pj.losses.load_balancing(logits, chosen, mask),
            pj.losses.load_balancing(logits, chosen),
        )

    logits, masked, balance = jax.jit(run)(params)
    wanted = torch.stack(outputs.router_logits).reshape(logits.shape).numpy()
    seen = batch["attention_mask"][None, ..., None]
    np.testing.assert_allclose(logits * seen, wanted * seen, rtol=0, atol=1e-4 * np.abs(wanted).max())
    loss = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    flat = tuple(torch.tensor(np.asarray(one)).reshape(-1, one.shape[-1]) for one in logits)
    count = model.block.config.experts.count
    np.testing.assert_allclose(masked, loss(flat, count, chosen, tensors["attention_mask"]), rtol=1e-5)
    np.testing.assert_allclose(balance, loss(flat, count, chosen), rtol=1e-5)
