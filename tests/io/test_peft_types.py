"""Adapters of PEFT's other types: the same logits, the same steps and the same files, both ways."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import describe_tensors, find_tensors
from peftjax.models.weight_map import convolution, embedding, linear

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

STEPS, RATE = 5, 1e-2


def ids():
    return np.random.default_rng(0).integers(1, 50, (2, 9)).astype(np.int32)


# Name -> (model, PEFT's configuration and its options).
CASES = {
    "ia3": (
        "bert",
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "task_type": "SEQ_CLS",
        },
    ),
    "loha": (
        "llama",
        "LoHaConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "alpha": 5, "rank_pattern": {"down_proj": 2}},
    ),
    "hira": ("llama", "HiraConfig", {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    "miss": ("llama", "MissConfig", {"target_modules": ["v_proj", "down_proj"], "r": 5}),
    "miss of repeated blocks": (
        "llama",
        "MissConfig",
        {"target_modules": ["q_proj"], "r": 4, "mini_r": 8, "init_weights": "mini"},
    ),
    "oft": ("llama", "OFTConfig", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}),
    "exact oft": (
        "llama",
        "OFTConfig",
        {
            "target_modules": ["q_proj", "v_proj"],
            "oft_block_size": 8,
            "use_cayley_neumann": False,
            "block_share": True,
        },
    ),
    "lokr": (
        "llama",
        "LoKrConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 2, "alpha": 5, "rank_pattern": {"down_proj": 3}},
    ),
    "lokr of two factors": (
        "llama",
        "LoKrConfig",
        {"target_modules": ["k_proj", "up_proj"], "r": 1, "decompose_both": True, "decompose_factor": 4},
    ),
    "lokr of whole matrices": (
        "llama",
        "LoKrConfig",
        {"target_modules": ["v_proj", "gate_proj"], "r": 9, "rank_pattern": {"v_proj": 12}},
    ),
    "hra": ("bert", "HRAConfig", {"target_modules": ["query", "value"], "r": 4, "task_type": "SEQ_CLS"}),
    "hra by Gram-Schmidt": (
        "llama",
        "HRAConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "apply_GS": True},
    ),
    "road": (
        "bert",
        "RoadConfig",
        {"target_modules": ["query", "output.dense"], "group_size": 8, "task_type": "SEQ_CLS"},
    ),
    "road of two": (
        "llama",
        "RoadConfig",
        {"target_modules": ["q_proj", "up_proj"], "group_size": 16, "variant": "road_2"},
    ),
    "road of four": (
        "llama",
        "RoadConfig",
        {"target_modules": ["q_proj", "up_proj"], "group_size": 8, "variant": "road_4"},
    ),
    "boft": (
        "bert",
        "BOFTConfig",
        {"target_modules": ["query", "output.dense"], "boft_block_size": 4, "task_type": "SEQ_CLS"},
    ),
    "boft of three rounds": (
        "llama",
        "BOFTConfig",
        {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4, "boft_n_butterfly_factor": 3},
    ),
    "c3a": (
        "llama",
        "C3AConfig",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "block_size": 8,
            "block_size_pattern": {"down_proj": 16},
        },
    ),
    "fourierft": (
        "bert",
        "FourierFTConfig",
        {
            "target_modules": ["query", "output.dense"],
            "n_frequency": 30,
            "n_frequency_pattern": {"attention.output.dense": 20},
            "scaling": 20.0,
            "task_type": "SEQ_CLS",
        },
    ),
    "waveft": (
        "llama",
        "WaveFTConfig",
        {"target_modules": ["q_proj", "down_proj"], "n_frequency": 40, "scaling": 2.0},
    ),
    "waveft without wavelets": (
        "llama",
        "WaveFTConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "n_frequency": 40,
            "scaling": 2.0,
            "use_idwt": False,
            "random_loc_seed": 5,
        },
    ),
    "gralora": (
        "llama",
        "GraloraConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 6, "alpha": 9, "gralora_k": 2},
    ),
    "gralora with a general part": (
        "llama",
        "GraloraConfig",
        {"target_modules": ["k_proj", "up_proj"], "r": 4, "gralora_k": 4, "hybrid_r": 3},
    ),
    "bone": (
        "llama",
        "MissConfig",
        {"target_modules": ["v_proj", "down_proj"], "r": 8, "init_weights": "bat"},
    ),
    "beft": ("bert", "BeftConfig", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "deft": (
        "bert",
        "DeftConfig",
        {"target_modules": ["query", "output.dense"], "r": 3, "alpha": 5, "task_type": "SEQ_CLS"},
    ),
    "deft by QR": (
        "llama",
        "DeftConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "decomposition_method": "qr"},
    ),
    "deft that only removes": (
        "llama",
        "DeftConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "para": True},
    ),
    "peanut": ("llama", "PeanutConfig", {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    "peanut of two layers": (
        "llama",
        "PeanutConfig",
        {"target_modules": ["v_proj", "up_proj"], "r": 4, "depth": 2, "act_fn": "gelu", "scaling": 0.5},
    ),
    "ln_tuning": (
        "bert",
        "LNTuningConfig",
        {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"},
    ),
    "ln_tuning of a decoder": (
        "llama",
        "LNTuningConfig",
        {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
    ),
    "supertuning": (
        "bert",
        "SupertuningConfig",
        {"target_modules": ["query", "output.dense"], "sparsity": 0.9, "task_type": "SEQ_CLS"},
    ),
    "supra": (
        "llama",
        "SupertuningConfig",
        {"target_modules": ["q_proj", "down_proj"], "sparsity": 0.95, "select_top": False, "r": 3},
    ),
    "glora": (
        "bert",
        "GloraConfig",
        {"target_modules": ["query", "output.dense"], "r": 3, "task_type": "SEQ_CLS"},
    ),
    "glora of vectors": (
        "bert",
        "GloraConfig",
        {
            "target_modules": ["key", "intermediate.dense"],
            "config_A_B": "vector",
            "config_C": "vector",
            "config_D_E": "vector",
            "task_type": "SEQ_CLS",
        },
    ),
    "glora without biases": (
        "llama",
        "GloraConfig",
        {"target_modules": ["q_proj", "down_proj"], "config_A_B": "constant"},
    ),
    "vera": ("llama", "VeraConfig", {"target_modules": ["q_proj", "v_proj"], "r": 12}),
    "adalora": (
        "llama",
        "AdaLoraConfig",
        {"target_modules": ["q_proj", "down_proj"], "init_r": 4, "target_r": 2, "total_step": 20},
    ),
    "pvera": ("llama", "PveraConfig", {"target_modules": ["q_proj", "down_proj"], "r": 12}),
    "randlora": (
        "llama",
        "RandLoraConfig",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 5, "randlora_alpha": 10},
    ),
    "vblora": (
        "llama",
        "VBLoRAConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "num_vectors": 12, "vector_length": 8, "topk": 3},
    ),
    "tinylora": (
        "llama",
        "TinyLoraConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "u": 5, "weight_tying": 0.4},
    ),
    "unilora": (
        "bert",
        "UniLoraConfig",
        {
            "target_modules": ["query", "output.dense"],
            "r": 3,
            "theta_d_length": 50,
            "save_indices": True,
            "task_type": "SEQ_CLS",
        },
    ),
    "frod": (
        "llama",
        "FrodConfig",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "sparse_rate": 0.1, "progressbar": False},
    ),
    "frod with biases": (
        "bert",
        "FrodConfig",
        {
            "target_modules": ["query", "output.dense"],
            "sparse_rate": 0.1,
            "bias": "frod_only",
            "progressbar": False,
            "task_type": "SEQ_CLS",
        },
    ),
    "adamss": (
        "llama",
        "AdamssConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 10, "num_subspaces": 4, "subspace_rank": 2},
    ),
    "adamss with biases": (
        "bert",
        "AdamssConfig",
        {
            "target_modules": ["query", "intermediate.dense"],
            "r": 9,
            "num_subspaces": 3,
            "subspace_rank": 3,
            "use_dynamic_rank": True,
            "svd_threshold": 0.7,
            "task_type": "SEQ_CLS",
        },
    ),
    "lily": (
        "llama",
        "LilyConfig",
        {"target_modules": ["q_proj", "o_proj", "down_proj"], "r": 4, "stride_A": 2, "num_B": 3},
    ),
    "osf": (
        "llama",
        "OSFConfig",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 5}},
    ),
    "mica": ("llama", "LoraConfig", {"target_modules": ["v_proj"], "r": 4, "init_lora_weights": "mica"}),
    "alora": (
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 3,
            "alora_invocation_tokens": ids()[0, 4:6].tolist(),  # and not in the other row
            "task_type": "CAUSAL_LM",
        },
    ),
    "kasa": (
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 3,
            "rank_pattern": {"down_proj": 2},
            "use_rslora": True,
            "kasa_config": {"beta": 0.01},
        },
    ),
    "bdlora": (
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "r": 4,
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj", "down_proj"],
                "target_modules_bd_b": ["q_proj"],
                "nblocks": 2,
            },
        },
    ),
    "bdlora beside lora": (
        "bert",
        "LoraConfig",
        {
            "target_modules": ["query", "value", "output.dense"],
            "r": 4,
            "use_bdlora": {
                "target_modules_bd_a": ["attention.output.dense"],
                "target_modules_bd_b": ["query"],
                "nblocks": 4,
                "match_strict": False,
            },
            "task_type": "SEQ_CLS",
        },
    ),
    "velora": (
        "llama",
        "LoraConfig",
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "velora_config": {"num_groups": 5}},
    ),
    "velora of fixed directions": (
        "bert",
        "LoraConfig",
        {
            "target_modules": ["query", "output.dense"],
            "r": 3,
            "velora_config": {"num_groups": 4, "init_type": "random", "scale": 0.5},
            "task_type": "SEQ_CLS",
        },
    ),
    "monteclora": (
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 3,
            "monteclora_config": {"num_samples": 3, "buffer_size": 2},
        },
    ),
    "lora on replicated layers": (
        "llama",
        "LoraConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 3,
            "rank_pattern": {"down_proj": 2},
            "layer_replication": [[0, 2], [1, 3]],
        },
    ),
    "velora on replicated layers": (
        "bert",
        "LoraConfig",
        {
            "target_modules": ["query", "output.dense"],
            "r": 3,
            "layer_replication": [[0, 3], [1, 2]],
            "velora_config": {"num_groups": 4},
            "task_type": "SEQ_CLS",
        },
    ),
    "delora": (
        "llama",
        "DeloraConfig",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 3,
            "delora_lambda": 4,
            "rank_pattern": {"down_proj": 2},
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random base models, with biases and norms that are far from trivial."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    llama = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    models = {
        "bert": transformers.BertForSequenceClassification(bert),
        "llama": transformers.LlamaForCausalLM(llama),
    }
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


class BlocksOnCpu:
    """What PEFT's kernel of BOFT does, without which it makes one round of them all."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*matrices) for matrices in blocks])]

    @staticmethod
    def backward(grad, blocks):
        count, size = blocks.shape[1:3]
        cut = grad.reshape(-1, count, size, count, size)
        return [torch.stack([cut[:, block, :, block] for block in range(count)], dim=1)]


@pytest.fixture(autouse=True)
def blocks_on_cpu(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlocksOnCpu)


HEADS = {"bert": ("BertForSequenceClassification", "classifier"), "llama": ("LlamaForCausalLM", "causal_lm")}


def torch_model(folders, name):
    return getattr(transformers, HEADS[name][0]).from_pretrained(folders[name]).eval()


def torch_logits(model):
    return model(input_ids=torch.tensor(ids(), dtype=torch.long)).logits


def started(folders, case):
    """PEFT's model of a case."""
    return moved_model(folders, *CASES[case])


def moved_model(folders, name, config, options):
    """PEFT's model, its adapter far from where it starts."""
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_model(folders, name), getattr(peft, config)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_steps_are_those_of_peft(case, folders, tmp_path):
    name = CASES[case][0]
    theirs = started(folders, case)
    theirs.save_pretrained(tmp_path / "theirs")
    # In training alone VeLoRA's backward pass reads what it kept.
    theirs.train(case.startswith("velora"))
    model, params = pj.load(folders[name], head=HEADS[name][1])
    method, frozen, trainable = pj.import_peft(tmp_path / "theirs", model, params)
    trainable, logits = trained_alike(folders, name, theirs, model, method, frozen, trainable)

    # What we write, PEFT reads; the files have the same tensors as its own.
    pj.export_peft(tmp_path / "ours", model, method, frozen, trainable)
    again = peft.PeftModel.from_pretrained(torch_model(folders, name), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(torch_logits(again).numpy(), logits, atol=1e-4)
    files = [find_tensors(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    ours, wanted = ({name: held.shape for name, held in describe_tensors(file).items()} for file in files)
    if case == "randlora":  # PEFT writes what all modules share beside each of them too
        copies = re.compile(r".+_proj\.randlora_[AB]")
        wanted = {name: shape for name, shape in wanted.items() if not copies.fullmatch(name)}
    # PEFT's GLoRA saves zeros for what it does not train.
    assert ours == {name: shape for name, shape in wanted.items() if not name.endswith(".zeros")}


def trained_alike(folders, name, theirs, model, method, frozen, trainable):
    """The same logits, merged too, and five steps of AdamW from the same numbers; ours after them."""
    batch = {"input_ids": jnp.asarray(ids()), "attention_mask": jnp.ones((2, 9), jnp.int32)}
    if name == "bert":
        batch["token_type_ids"] = jnp.zeros((2, 9), jnp.int32)
    run = jax.jit(lambda params, batch: pj.adapt(method.model(model))(params, batch))

    def logits(params):
        out = run(params, batch)
        return np.asarray(out[0] if isinstance(out, tuple) else out)

    with torch.no_grad():
        wanted = torch_logits(theirs).numpy()
    np.testing.assert_allclose(logits(method.apply(frozen, trainable)), wanted, atol=1e-4)
    if getattr(pj.METHODS.get(method.name), "mergeable", True):
        np.testing.assert_allclose(logits(method.merge(frozen, trainable)), wanted, atol=1e-4)

    target = torch.tensor(np.random.default_rng(1).normal(size=wanted.shape), dtype=torch.float32)
    own = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=RATE, weight_decay=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = ((torch_logits(theirs) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))

    def loss_of(params, batch):
        return jnp.mean((pj.adapt(method.model(model))(params, batch) - jnp.asarray(target.numpy())) ** 2)

    tx = optax.adamw(RATE, weight_decay=0.01)

    @jax.jit
    def step(trainable, state):
        loss, grads = jax.value_and_grad(lambda t: loss_of(method.apply(frozen, t), batch))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, found = tx.init(trainable), []
    for _ in range(STEPS):
        trainable, state, loss = step(trainable, state)
        found.append(float(loss))
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    return trainable, logits(method.apply(frozen, trainable))


def test_the_minor_directions_are_those_that_peft_finds(folders):
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights="mica")
    theirs = peft.get_peft_model(torch_model(folders, "llama"), config).state_dict()
    _, params = pj.load(folders["llama"], head="causal_lm")
    frozen, trainable = pj.mica(rank=4, targets=["value"]).init(jax.random.key(0), params)
    ours = np.asarray(frozen.state["blocks/attention/value/kernel"]["b"])
    assert not np.any(trainable["blocks/attention/value/kernel"]["a"])
    for layer, b in enumerate(ours):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_B.default.weight"
        wanted = theirs[name].numpy()
        # Singular vectors have either sign.
        np.testing.assert_allclose(b.T @ b, wanted @ wanted.T, atol=1e-4)


# PEFT saves neither of PSOFT's frozen factors, so that a file alone does not say what was trained.
PSOFT = {
    "exact": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "psoft_alpha": 8},
        {"rank": 4, "alpha": 8.0, "targets": ["query", "down"]},
    ),
    "a series": (
        "llama",
        {
            "target_modules": ["v_proj"],
            "r": 5,
            "ab_svd_init": "pissa_init",
            "use_cayley_neumann": True,
            "psoft_mag_a": False,
        },
        {"rank": 5, "split": "even", "terms": 5, "scale_in": False, "targets": ["value"]},
    ),
}
THEIRS = {"query": "q_proj", "value": "v_proj", "down": "down_proj"}


@pytest.mark.parametrize("case", PSOFT)
def test_psoft_between_the_same_directions_is_that_of_peft(case, folders):
    name, config, options = PSOFT[case]
    theirs = moved_model(folders, name, "PsoftConfig", config)
    model, params = pj.load(folders[name], head=HEADS[name][1])
    method = pj.psoft(**options)
    frozen, trainable = method.init(jax.random.key(0), params)
    tensors = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    ends = {"skew": "psoft_R.default.weight", "scale_in": "psoft_R.default.vector_a"}
    ends |= {"scale_out": "psoft_R.default.vector_b"}
    ends |= {"a": "_psoft_A_cache.default", "b": "_psoft_B_cache.default"}

    def filled(part):
        new = {}
        for path, slots in part.items():
            module = next(own for ours, own in THEIRS.items() if ours in path)
            new[path] = {}
            for slot, value in slots.items():
                names = [key for key in tensors if f".{module}." in key and key.endswith(ends[slot])]
                found = np.stack([tensors[key].detach().numpy() for key in names])
                found = found.swapaxes(-1, -2) if slot == "b" else found
                if slot in ("a", "b"):  # up to signs, the factors that we find are PEFT's
                    np.testing.assert_allclose(jnp.abs(value), np.abs(found), atol=1e-4)
                new[path][slot] = jnp.asarray(found)
        return new

    frozen = dataclasses.replace(frozen, state=filled(frozen.state))
    trained_alike(folders, name, theirs, model, method, frozen, filled(trainable))


class Convolved(torch.nn.Module):
    """A convolution with a window, and one without."""

    def __init__(self, dims):
        super().__init__()
        layer = (torch.nn.Conv1d, torch.nn.Conv2d)[dims - 1]
        self.first, self.second = layer(4, 8, 3, stride=2, padding=1), layer(8, 12, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def convolved(params, x):
    dims = x.ndim - 2
    spec = ("NC" + "XY"[:dims], "XY"[:dims] + "IO", "NC" + "XY"[:dims])
    for layer, stride, pad in (("conv_first", 2, 1), ("conv_second", 1, 0)):
        kernel, bias = params[layer]["kernel"], params[layer]["bias"]
        padding = [(pad, pad)] * dims
        x = jax.lax.conv_general_dilated(x, kernel, (stride,) * dims, padding, dimension_numbers=spec)
        x = x + bias.reshape(-1, *(1,) * dims)
        x = jnp.tanh(x) if layer == "conv_first" else x
    return x


class LookedUp(torch.nn.Module):
    """A table and a linear layer."""

    def __init__(self, dims):
        super().__init__()
        self.first, self.second = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 12)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def looked_up(params, x):
    return jnp.tanh(params["first"]["embedding"][x]) @ params["second"]["kernel"] + params["second"]["bias"]


BOTH = ["first", "second"]
# Type -> (dimensions, PEFT's configuration and its options); blocks of inputs have no window in common.
OTHER_LAYERS = {
    "loha": (2, "LoHaConfig", {"target_modules": BOTH, "r": 3}),
    "loha in one dimension": (1, "LoHaConfig", {"target_modules": BOTH, "r": 3}),
    "hira": (2, "HiraConfig", {"target_modules": BOTH, "r": 3}),
    "hira in one dimension": (1, "HiraConfig", {"target_modules": BOTH, "r": 3}),
    "hira of a table": (0, "HiraConfig", {"target_modules": BOTH, "r": 3}),
    "hra": (2, "HRAConfig", {"target_modules": BOTH, "r": 4}),
    "ia3": (2, "IA3Config", {"target_modules": BOTH, "feedforward_modules": []}),
    "adalora": (2, "AdaLoraConfig", {"target_modules": BOTH, "init_r": 3, "target_r": 2, "total_step": 20}),
    "lokr": (2, "LoKrConfig", {"target_modules": ["second"], "r": 1, "decompose_factor": 4}),
    "lokr of a whole matrix": (2, "LoKrConfig", {"target_modules": ["second"], "r": 4}),
    "oft": (2, "OFTConfig", {"target_modules": ["second"], "oft_block_size": 4}),
    "boft": (2, "BOFTConfig", {"target_modules": ["second"], "boft_block_size": 4}),
}


@pytest.mark.parametrize("case", OTHER_LAYERS)
def test_layers_that_are_not_linear_have_the_same_outputs(case, tmp_path):
    dims, config, options = OTHER_LAYERS[case]
    layers, forward = (Convolved, convolved) if dims else (LookedUp, looked_up)

    def base():
        torch.manual_seed(0)
        return layers(dims).eval()

    to_ours = lambda w: jnp.asarray(np.moveaxis(w.detach().numpy(), (0, 1), (-1, -2)))
    params = {}
    for name, own in base().named_children():
        if isinstance(own, torch.nn.Embedding):
            params[name] = {"embedding": jnp.asarray(own.weight.detach().numpy())}
        else:
            path = f"conv_{name}" if dims else name
            params[path] = {"kernel": to_ours(own.weight), "bias": jnp.asarray(own.bias.detach().numpy())}
    if dims:
        entries = [entry for name in BOTH for entry in convolution(f"conv_{name}", name)]
    else:
        entries = [embedding("first", "first"), *linear("second", "second")]

    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(), getattr(peft, config)(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        x = torch.randn(2, 4, *(9, 8)[:dims]) if dims else torch.arange(10).reshape(2, 5)
        wanted, plain = theirs(x).numpy(), base()(x).numpy()
    assert np.abs(wanted - plain).max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    method, frozen, trainable = pj.import_peft(tmp_path / "theirs", entries, params)
    for applied in (method.apply(frozen, trainable), method.merge(frozen, trainable)):
        np.testing.assert_allclose(pj.adapt(forward)(applied, x.numpy()), wanted, atol=1e-4)
    pj.export_peft(tmp_path / "ours", entries, method, frozen, trainable)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(x).numpy(), wanted, atol=1e-4)
    files = [find_tensors(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    ours, others = ({name: held.shape for name, held in describe_tensors(file).items()} for file in files)
    assert ours == others


def test_a_whole_lokr_matrix_of_a_convolution_in_one_dimension_is_refused(tmp_path):
    config = peft.LoKrConfig(target_modules=["second"], r=4)
    peft.get_peft_model(Convolved(1), config).save_pretrained(tmp_path)
    shapes = {"conv_first": (3, 4, 8), "conv_second": (1, 8, 12)}
    params = {path: {"kernel": jnp.ones(s), "bias": jnp.ones(s[-1])} for path, s in shapes.items()}
    entries = [entry for name in BOTH for entry in convolution(f"conv_{name}", name)]
    with pytest.raises(PeftError, match="no Kronecker product"):
        pj.import_peft(tmp_path, entries, params)


def test_blocks_across_a_window_are_refused(tmp_path):
    config = peft.OFTConfig(target_modules=["first"], oft_block_size=4)
    peft.get_peft_model(Convolved(2), config).save_pretrained(tmp_path)
    params = {"conv": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)}}
    with pytest.raises(PeftError, match="across a window of 3 x 3 otherwise in PEFT"):
        pj.import_peft(tmp_path, convolution("conv", "first"), params)
