"""A training of AdaLoRA beside PEFT's: importance, budget, cuts and penalty, and the file at its end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.io.files import read_json
from peftjax.io.safetensors import describe_tensors, find_tensors

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

STEPS, RATE = 12, 3e-2
IDS = np.random.default_rng(0).integers(1, 50, (2, 9)).astype(np.int32)


def test_a_training_is_that_of_peft(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def base():
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()

    options = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS}
    own = peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(base(), own)
    theirs.eval()
    theirs.save_pretrained(tmp_path / "start")
    model, params = pj.load(tmp_path / "base", head="causal_lm")
    method, frozen, trainable = pj.import_peft(tmp_path / "start", model, params)

    # PEFT's loop: the loss has the penalty, and the budget is asked after each step.
    ids = torch.tensor(IDS, dtype=torch.long)
    trained = [p for n, p in theirs.named_parameters() if p.requires_grad]
    optimizer, wanted = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0), []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        wanted.append(e_of(theirs))

    batch = {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.ones(IDS.shape, jnp.int32)}
    run = pj.adapt(method.model(model))

    def loss(params):
        logits = jnp.asarray(run(params, batch))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:]).mean()

    tx = method.optimizer(optax.adamw(RATE, weight_decay=0.0))
    state, found = tx.init(trainable), []

    @jax.jit
    def stepped(frozen, trainable, state):
        grads = jax.grad(lambda t: loss(method.apply(frozen, t)))(trainable)
        updates, state = tx.update(grads, state, trainable, frozen=frozen)
        return optax.apply_updates(trainable, updates), state

    for step in range(STEPS):
        frozen, trainable, state = method.advance(
            loss, frozen, trainable, state, step=step, key=jax.random.key(0), tx=tx
        )
        if step:
            found.append(what_is_left(frozen, trainable))
        trainable, state = stepped(frozen, trainable, state)
    found.append(what_is_left(frozen, trainable))

    for step, (ours, peft_e) in enumerate(zip(found, wanted), 1):
        for module, values in peft_e.items():
            np.testing.assert_allclose(
                own_of(ours, module), values, rtol=2e-3, atol=2e-5, err_msg=f"{step} {module}"
            )
            np.testing.assert_array_equal(own_of(ours, module) == 0, values == 0)
    pattern = theirs.peft_config["default"].rank_pattern
    gates = {path: np.asarray(slots["gate"]) for path, slots in frozen.state.items()}
    for key, kept in pattern.items():
        np.testing.assert_array_equal(own_of(gates, key), kept)
    assert sum(int(count.sum()) for count in pj.adapters.ranks(frozen).values()) == 2 * 6

    # Both write the same names and shapes, and PEFT reads what is written here.
    theirs.save_pretrained(tmp_path / "theirs")
    pj.export_peft(tmp_path / "ours", model, method, frozen, trainable)
    files = [find_tensors(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    shapes = [{name: held.shape for name, held in describe_tensors(file).items()} for file in files]
    assert shapes[0] == shapes[1]
    patterns = [
        read_json(tmp_path / side / "adapter_config.json")["rank_pattern"] for side in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    logits = np.asarray(run(method.apply(frozen, trainable), batch))
    with torch.no_grad():
        np.testing.assert_allclose(again(input_ids=ids).logits.numpy(), logits, atol=1e-4)
    for side in ("ours", "theirs"):
        method, frozen, trainable = pj.import_peft(tmp_path / side, model, params)
        got = np.asarray(run(method.apply(frozen, trainable), batch))
        np.testing.assert_allclose(got, logits, atol=1e-3 if side == "theirs" else 1e-5)


def what_is_left(frozen, trainable):
    """E of ours, without what is cut for good, which PEFT sets to 0 again after each step."""
    return {path: np.asarray(slots["e"]) * frozen.state[path]["gate"] for path, slots in trainable.items()}


def e_of(model):
    return {
        name: parameter.detach().numpy().reshape(-1).copy()
        for name, parameter in model.named_parameters()
        if ".lora_E." in name
    }


def own_of(arrays, module):
    """The row of ours that is a module of PEFT's."""
    layer = int(module.partition("layers.")[2].partition(".")[0])
    (path,) = [path for path in arrays if ("query" if "q_proj" in module else "down") in path]
    return arrays[path][layer]
