"""Adapters of experts exchanged with the real PEFT library: the same logits both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import noisy

import peftjax as pj
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 12, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 4}
CASES = {
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
}
ROUTERS = {"gpt_oss": "mlp.router.weight", "qwen3_moe": "mlp.gate.weight", "mixtral": "mlp.gate.weight"}
IDS = {"input_ids": np.random.default_rng(0).integers(3, 50, (2, 9)).astype(np.int32)}


def move(model, size):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def load_theirs(folder, name):
    cls = getattr(transformers, f"{name}ForCausalLM")
    return cls.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(IDS["input_ids"]).long()).logits.numpy()


def ours(model, params):
    return np.asarray(jax.jit(lambda params: jnp.asarray(pj.adapt(model)(params, IDS)))(params))


def close(left, right):
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4 * np.abs(right).max())


@pytest.fixture(scope="module", params=CASES)
def base(request, tmp_path_factory):
    """(family, its class, folder of a random base)."""
    name, settings = CASES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES, **settings)
    )
    move(model, 0.2)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return request.param, name, folder


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",), ("gate_up_proj",)])
def test_theirs_come_in_and_go_out(base, parameters, tmp_path):
    family, name, folder = base
    torch.manual_seed(1)
    options = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=[*(f"mlp.experts.{parameter}" for parameter in parameters), ROUTERS[family]],
        rank_pattern={f"mlp.experts.{parameters[0]}": 3},
    )
    model = peft.get_peft_model(load_theirs(folder, name), options)
    move(model, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    want = theirs(model)
    backbone, params = pj.load(folder)
    method, frozen, trainable = pj.import_peft(tmp_path / "theirs", backbone, params)
    close(ours(backbone, method.apply(frozen, trainable)), want)
    assert np.abs(want - ours(backbone, params)).max() > 1e-2
    pj.export_peft(tmp_path / "ours", backbone, method, frozen, trainable)
    shapes = lambda path: {
        name: tensor.shape for name, tensor in read_tensors(find_tensors(path / "adapter_model.safetensors"))
    }
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    close(theirs(peft.PeftModel.from_pretrained(load_theirs(folder, name), str(tmp_path / "ours"))), want)


def test_all_linear_of_peft(base, tmp_path):
    """Attention alone of gpt-oss; of families whose experts were linear layers once, all of it."""
    family, name, folder = base
    model = peft.get_peft_model(load_theirs(folder, name), peft.LoraConfig(r=2, target_modules="all-linear"))
    move(model, 0.2)
    model.save_pretrained(tmp_path)
    backbone, params = pj.load(folder)
    method, frozen, trainable = pj.import_peft(tmp_path, backbone, params)
    close(ours(backbone, method.apply(frozen, trainable)), theirs(model))
    targets = ".*attention.*" if family == "gpt_oss" else ".*(attention|experts|router).*"
    fresh = pj.lora(rank=2, targets=targets).init(jax.random.key(0), params)[1]
    assert trainable.keys() == fresh.keys()


@pytest.mark.parametrize("layers", [None, [1]])
def test_ours_go_out_and_come_back(base, layers, tmp_path):
    """Gate and up have factors of their own, which are one pair of twice the rank there."""
    _, name, folder = base
    backbone, params = pj.load(folder)
    method = pj.rslora(rank=2, targets=["query", "gate", "up", "down"], layers=layers, dropout=0.1)
    frozen, trainable = method.init(jax.random.key(0), params)
    trainable = noisy(trainable, scale=0.3)
    want = ours(backbone, method.apply(frozen, trainable))
    pj.export_peft(tmp_path, backbone, method, frozen, trainable)
    close(theirs(peft.PeftModel.from_pretrained(load_theirs(folder, name), str(tmp_path))), want)
    again = pj.import_peft(tmp_path, backbone, params)
    close(ours(backbone, again[0].apply(*again[1:])), want)


def test_what_has_no_form_there_is_an_error(base, tmp_path):
    family, name, folder = base
    if family != "gpt_oss":
        pytest.skip("one family tells")
    backbone, params = pj.load(folder)

    def exported(method):
        frozen, trainable = method.init(jax.random.key(0), params)
        pj.export_peft(tmp_path / "ours", backbone, method, frozen, noisy(trainable))

    with pytest.raises(pj.PeftError, match="DoRA's magnitudes or a bias of the adapter's own"):
        exported(pj.dora(rank=2, targets=["up"]))
    with pytest.raises(pj.PeftError, match=r"experts/down/.*' is trained as it is.*part of a module"):
        exported(pj.chain(pj.unfreeze(".*experts/down/.*"), pj.lora(rank=2, targets=["query"])))
    options = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    peft.get_peft_model(load_theirs(folder, name), options).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = dict(read_tensors(find_tensors(file)))
    first = "base_model.model.model.layers.0.mlp.experts.lora_"
    write_tensors(file, {**tensors, f"{first}A.weight": tensors[f"{first}A.weight"][:4]})
    with pytest.raises(pj.PeftError, match=r"lora_A.weight' has shape \[4, 12\]; rank 2 on 3 experts needs"):
        pj.import_peft(tmp_path, backbone, params)
    write_tensors(file, {name: tensor for name, tensor in tensors.items() if not name.startswith(first)})
    with pytest.raises(pj.PeftError, match=r"asks for 'model.layers.0.mlp.experts.down_proj'.*missing"):
        pj.import_peft(tmp_path, backbone, params)
