"""Adapters exchanged with the real PEFT library: the same logits in both directions."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import all_but_slow, noisy

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.cli.peft import export_saved, import_saved
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.io.safetensors import find_tensors, read_tensors
from peftjax.models.weight_map import TensorEntry, convolution, embedding, linear
from peftjax.train.saved_adapter import merge_saved

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = pytest.mark.parity

LAYERS = 3
# head -> (transformers class, its output)
CLASSES = {
    "none": ("BertModel", "last_hidden_state"),
    "cls": ("BertModel", "pooler_output"),
    "classifier": ("BertForSequenceClassification", "logits"),
    "masked_lm": ("BertForMaskedLM", "logits"),
}
QUERY = "bert.encoder.layer.{}.attention.self.query"
# What PEFT is asked for, by the head it is for.
CASES = {
    "list": ("none", {"target_modules": ["query", "value"]}),
    "regex": ("cls", {"target_modules": r".*\.(up|intermediate\.dense|pooler\.dense)"}),
    "rslora": ("classifier", {"target_modules": ["key"], "use_rslora": True, "lora_alpha": 5}),
    "dora": ("classifier", {"target_modules": ["query", "dense"], "use_dora": True}),
    "task": ("classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS", "lora_dropout": 0.1}),
    "saved modules": ("classifier", {"target_modules": ["key"], "modules_to_save": ["pooler", "classifier"]}),
    "all-linear": ("classifier", {"target_modules": "all-linear", "exclude_modules": ["value"]}),
    "all-linear lm": ("masked_lm", {"target_modules": "all-linear"}),
    "ranks": (
        "classifier",
        {
            "target_modules": ["query", "output.dense"],
            "task_type": "SEQ_CLS",
            "rank_pattern": {"layer.0.attention.self.query": 2, "^bert.encoder.layer.2.output.dense": 8},
            "alpha_pattern": {r"layer\.1\..*query": 3},
        },
    ),
    "layers": ("none", {"target_modules": ["query", "value"], "layers_to_transform": [0, 2]}),
    "layers of a list": (
        "classifier",
        {"target_modules": ["query", "pooler.dense"], "layers_to_transform": 1, "layers_pattern": "layer"},
    ),
    "dora of some": (
        "none",
        {"target_modules": r".*layer\.1.*(query|key)|.*layer\.0.*key", "use_dora": True},
    ),
    "rank above the matrix": ("classifier", {"target_modules": ["classifier"], "r": 8}),
    "embedding": ("none", {"target_modules": ["word_embeddings", "query"]}),
    "embedding dora": ("none", {"target_modules": ["position_embeddings"], "use_dora": True}),
    "bias of the adapted": ("classifier", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "all biases": ("masked_lm", {"target_modules": ["query"], "bias": "all"}),
    "all biases and a head": (
        "classifier",
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "shifted biases": ("none", {"target_modules": ["query"], "lora_bias": True}),
    "orthogonal": ("none", {"target_modules": ["query"], "init_lora_weights": "orthogonal"}),
}
# Marked as slow: other cases have the parts of each.
LONG_CASES = {"all biases", "all-linear lm", "dora", "layers of a list", "orthogonal"}
LONG_METHODS = {"mica", "dora of two layers", "pissa and more", "randomized pissa", "tied and adapted"}
# Ours, and the head it is for: what the export must make PEFT compute.
METHODS = {
    "lora": ("none", pj.lora(rank=4, targets=["query", "up"])),
    "patterns": ("none", pj.lora(rank=4, rank_pattern={"up": 2}, alpha_pattern={"^blocks/attention/key": 5})),
    "rslora": ("classifier", pj.rslora(rank=3)),
    "lora_fa": ("cls", pj.lora_fa(rank=4, targets=["pooler", "query"])),
    "lora_plus": ("none", pj.lora_plus(rank=4, targets=["value"])),
    "dora": ("classifier", pj.dora(rank=4, bias="adapted")),
    "dora of two layers": ("none", pj.dora(rank=4, layers=[0, 2])),
    "mica": ("none", pj.mica(rank=4, targets=["query", "up"])),
    "pissa": ("classifier", pj.pissa(rank=4)),
    "randomized pissa": ("none", pj.pissa(rank=4, iterations=2, targets=["query"])),
    "olora": ("none", pj.olora(rank=4, rslora=True)),
    "pissa and more": (
        "classifier",
        pj.chain(
            pj.pissa(rank=2, targets=["query"]), pj.lora(rank=4, targets=["key"]), pj.unfreeze(["head"])
        ),
    ),
    "two on one": ("none", pj.chain(pj.lora(rank=2, targets=["key"]), pj.lora(rank=3, targets=["key"]))),
    "head and norms": (
        "classifier",
        pj.chain(pj.lora(rank=4), pj.unfreeze(["head/classifier", "embed/norm", "attention_norm"])),
    ),
    "tied": ("masked_lm", pj.chain(pj.lora(rank=4, targets=["word", "query"]), pj.unfreeze(["head/bias"]))),
    "tied and adapted": ("masked_lm", pj.lora(rank=4, targets=["word"])),
    "all biases": ("masked_lm", pj.lora(rank=4, bias="all", targets=["query"])),
    "tied and trained": (
        "masked_lm",
        pj.chain(pj.lora(rank=4, targets=["query"]), pj.unfreeze(["embed/word"])),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random base model of every class, with norms and biases that are far from trivial."""
    found = {}
    for name in {name for name, _ in CLASSES.values()}:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=12,
            num_labels=3,
        )
        model = getattr(transformers, name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (2, 9)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids % 2}


def hf_model(folders, head):
    name, _ = CLASSES[head]
    return getattr(transformers, name).from_pretrained(folders[name], attn_implementation="eager").eval()


def theirs(model, head, batch):
    inputs = {key: torch.tensor(value, dtype=torch.long) for key, value in batch.items()}
    with torch.no_grad():
        return model.eval()(**inputs)[CLASSES[head][1]].numpy()


def peft_outputs(folders, head, adapter, batch):
    with warnings.catch_warnings():
        # PEFT warns, and goes on, when a tensor is missing in the file.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(hf_model(folders, head), str(adapter))
    return theirs(model, head, batch)


def ours(model, method, frozen, trainable, batch):
    return np.asarray(pj.adapt(model)(method.apply(frozen, trainable), batch))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def randomize(model):
    """Trained-looking numbers in whatever PEFT trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def tensors_of(folder):
    return dict(read_tensors(find_tensors(folder / "adapter_model.safetensors")))


@pytest.fixture(scope="module", params=all_but_slow(CASES, CASES.keys() - LONG_CASES))
def from_peft(request, folders, batch, tmp_path_factory):
    """(head, adapter folder, PEFT's outputs) of an adapter that PEFT made."""
    head, options = CASES[request.param]
    model = peft.get_peft_model(
        hf_model(folders, head), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
    )
    randomize(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return head, folder, theirs(model, head, batch)


def test_what_peft_saved_computes_the_same_here_and_again_there(from_peft, folders, batch, tmp_path):
    head, folder, want = from_peft
    model, params = pj.load(folders[CLASSES[head][0]], head=head)
    method, frozen, trainable = pj.import_peft(folder, model, params)
    base = np.asarray(model(params, batch))
    assert np.abs(base - want).max() > 0.01  # the adapter does something
    close(ours(model, method, frozen, trainable, batch), want)
    close(model(method.merge(frozen, trainable), batch), want)

    save_adapter(tmp_path / "ours", method, frozen, trainable, seed=0)
    again = load_adapter(tmp_path / "ours", params)
    np.testing.assert_array_equal(
        ours(model, again.method, again.frozen, again.trainable, batch),
        ours(model, method, frozen, trainable, batch),
    )
    pj.export_peft(tmp_path / "peft", model, method, frozen, trainable)
    close(peft_outputs(folders, head, tmp_path / "peft", batch), want)


def test_an_imported_adapter_trains_and_stays_exact(from_peft, folders, batch):
    head, folder, _ = from_peft
    model, params = pj.load(folders[CLASSES[head][0]], head=head)
    method, frozen, trainable = pj.import_peft(folder, model, params)

    def loss(trainable):
        return jnp.sum(jnp.square(jnp.asarray(pj.adapt(model)(method.apply(frozen, trainable), batch))))

    grads = jax.grad(loss)(trainable)
    names = tree.named_leaves(grads)
    for name, leaf in tree.named_leaves(trainable).items():
        factor = name.rsplit("/", 1)[-1]
        if factor in ("a", "b"):
            other = tree.named_leaves(trainable)[name[:-1] + ("b" if factor == "a" else "a")]
            padded = ~np.asarray(leaf).any(-1) & ~np.asarray(other).any(-1)
            assert not np.asarray(names[name])[padded].any()  # filled-up ranks stay zero


@pytest.mark.parametrize("case", all_but_slow(METHODS, METHODS.keys() - LONG_METHODS))
def test_what_we_export_computes_the_same_there_and_again_here(case, folders, batch, tmp_path):
    head, method = METHODS[case]
    model, params = pj.load(folders[CLASSES[head][0]], head=head)
    frozen, initial = method.init(jax.random.key(0), params)
    trainable = noisy(initial)
    want = ours(model, method, frozen, trainable, batch)
    pj.export_peft(tmp_path, model, method, frozen, trainable, base="base", initial=initial)
    assert np.abs(np.asarray(model(params, batch)) - want).max() > 0.01
    close(peft_outputs(folders, head, tmp_path, batch), want)
    close(ours(model, *pj.import_peft(tmp_path, model, params), batch), want)


def test_a_file_of_peft_is_reproduced(folders, tmp_path):
    head, options = CASES["ranks"]
    model = peft.get_peft_model(
        hf_model(folders, head),
        peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options, "alpha_pattern": {}}),
    )
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    backbone, params = pj.load(folders[CLASSES[head][0]], head=head)
    pj.export_peft(tmp_path / "ours", backbone, *pj.import_peft(tmp_path / "theirs", backbone, params))
    want, got = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_the_configuration_has_the_fields_that_peft_writes(folders, tmp_path):
    model, params = pj.load(folders["BertModel"])
    method = pj.lora(rank=2)
    pj.export_peft(tmp_path / "ours", model, method, *method.init(jax.random.key(0), params))
    peft.LoraConfig(target_modules=["query"]).save_pretrained(tmp_path / "theirs")
    got, want = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
    )
    assert got.keys() < want.keys()  # those at their defaults are left to the reader's version


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_residual_starts_are_read_once_peft_has_converted_them(start, folders, batch, tmp_path):
    model = peft.get_peft_model(
        hf_model(folders, "none"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], init_lora_weights=start),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    randomize(model)
    want = theirs(model, "none", batch)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    backbone, params = pj.load(folders["BertModel"])
    with pytest.raises(PeftError, match="path_initial_model_for_weight_conversion"):
        pj.import_peft(tmp_path / "raw", backbone, params)
    close(ours(backbone, *pj.import_peft(tmp_path / "plain", backbone, params), batch), want)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of no family of ours whose embedding, 'embed_tokens', is its output layer too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


LLAMA_TABLE = [
    embedding("embed", "model.embed_tokens"),
    TensorEntry("embed/embedding", "lm_head.weight", kind="tied"),
]


def llama_logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12).reshape(2, 6)).logits.numpy()


def with_embedding(folder, table):
    """The base's logits with another table."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(np.asarray(table)))
    return llama_logits(model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["both", "embedding", "saved"],
)
def test_embeddings_that_peft_keeps_tied(options, llama, tmp_path):
    base = transformers.LlamaForCausalLM.from_pretrained(llama)
    params = {"embed": {"embedding": jnp.asarray(base.get_input_embeddings().weight.detach().numpy())}}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **options, ensure_weight_tying=True))
    randomize(model)
    table = LLAMA_TABLE
    if "q_proj" in options["target_modules"]:
        table = [*LLAMA_TABLE, linear("q", "model.layers.0.self_attn.q_proj")[0]]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        params["q"] = {"kernel": jnp.zeros((8, 8))}
    want = llama_logits(model)
    model.save_pretrained(tmp_path / "theirs")
    method, frozen, trainable = pj.import_peft(tmp_path / "theirs", table, params)
    close(with_embedding(llama, method.merge(frozen, trainable)["embed"]["embedding"]), want)
    pj.export_peft(tmp_path / "ours", table, method, frozen, trainable)
    again = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(llama), str(tmp_path / "ours")
    )
    close(llama_logits(again), want)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["word_embeddings", "decoder"], "ensure_weight_tying": True},
        {"target_modules": ["query"], "modules_to_save": ["word_embeddings"], "ensure_weight_tying": True},
    ],
)
def test_an_embedding_changed_apart_from_its_tied_output_layer_is_refused(options, folders, tmp_path):
    model = peft.get_peft_model(hf_model(folders, "masked_lm"), peft.LoraConfig(r=4, **options))
    randomize(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(PeftError, match="embed_tokens"):
        pj.import_peft(tmp_path, *pj.load(folders["BertForMaskedLM"], head="masked_lm"))


def test_an_adapter_of_one_class_fits_the_same_backbone_in_another(folders, batch, tmp_path):
    model = peft.get_peft_model(
        hf_model(folders, "classifier"), peft.LoraConfig(r=4, target_modules=["query"])
    )
    randomize(model)
    model.save_pretrained(tmp_path)
    backbone, params = pj.load(folders["BertForSequenceClassification"], head="none")
    want = theirs(model.merge_and_unload().bert, "none", batch)
    close(ours(backbone, *pj.import_peft(tmp_path, backbone, params), batch), want)


def test_merged_checkpoints_load_in_transformers(folders, batch, tmp_path):
    head, options = CASES["saved modules"]
    model = peft.get_peft_model(hf_model(folders, head), peft.LoraConfig(r=4, **options))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    import_saved(tmp_path / "adapter", str(folders[CLASSES[head][0]]), tmp_path / "ours", max_length=9)
    merge_saved(tmp_path / "ours", tmp_path / "merged")
    merged = getattr(transformers, CLASSES[head][0]).from_pretrained(tmp_path / "merged")
    close(theirs(merged, head, batch), theirs(model, head, batch))


def test_a_merged_checkpoint_has_the_dtype_of_its_base(folders, tmp_path):
    base = tmp_path / "base"
    transformers.BertModel.from_pretrained(folders["BertModel"]).bfloat16().save_pretrained(base)
    _, params = pj.load(base, head="none")
    method = pj.lora(rank=2, targets=["query"])
    frozen, initial = method.init(jax.random.key(0), params)
    info = {"model": str(base), "head": "none", "labels": [], "max_length": 9}
    trainable = noisy(initial)
    save_adapter(tmp_path / "ours", method, frozen, trainable, seed=0, info=info)
    merge_saved(tmp_path / "ours", tmp_path / "merged")
    merged = dict(read_tensors(find_tensors(tmp_path / "merged")))
    assert {tensor.dtype for tensor in merged.values()} == {np.dtype(jnp.bfloat16)}
    name = "encoder.layer.0.attention.self.query.weight"
    full = next(tensor for key, tensor in merged.items() if key.endswith(name))
    exact = method.merge(frozen, trainable)["blocks"]["attention"]["query"]["kernel"][0].T
    np.testing.assert_array_equal(full, np.asarray(exact).astype(jnp.bfloat16))


def test_a_head_that_the_base_lacks_goes_with_the_adapter(folders, batch, tmp_path):
    base = folders["BertForMaskedLM"]  # which has neither pooler nor classifier
    model, params = pj.load(base, head="classifier", key=jax.random.key(5))
    method = pj.chain(pj.lora(rank=2, targets=["query"]), pj.unfreeze(["head/classifier"]))
    frozen, initial = method.init(jax.random.key(5), params)
    trainable = noisy(initial)
    info = {"model": str(base), "head": "classifier", "labels": ["a", "b", "c"], "max_length": 9}
    save_adapter(tmp_path / "ours", method, frozen, trainable, seed=5, info=info)
    export_saved(tmp_path / "ours", tmp_path / "peft")
    hf = transformers.BertForSequenceClassification.from_pretrained(base, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(hf, str(tmp_path / "peft"))
    close(theirs(loaded, "classifier", batch), ours(model, method, frozen, trainable, batch))


class TorchConvolutions(torch.nn.Module):
    """Two convolutions of the same number of dimensions; the first may have groups."""

    def __init__(self, dims, groups):
        super().__init__()
        layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
        self.first = layer(4, 8, 3, stride=2, padding=1, groups=groups)
        self.second = layer(8, 6, tuple(range(2, 2 + dims)))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def jax_convolutions(groups):
    def forward(params, x):
        dims = x.ndim - 2
        spec = ("NC" + "XYZ"[:dims], "XYZ"[:dims] + "IO", "NC" + "XYZ"[:dims])
        for layer, stride, pad, group in (("conv_first", 2, 1, groups), ("conv_second", 1, 0, 1)):
            x = jax.lax.conv_general_dilated(
                x, params[layer]["kernel"], (stride,) * dims, [(pad, pad)] * dims,
                dimension_numbers=spec, feature_group_count=group,
            )  # fmt: skip
            x = x + params[layer]["bias"].reshape(-1, *(1,) * dims)
            x = jnp.tanh(x) if layer == "conv_first" else x
        return x

    return forward


@pytest.mark.parametrize(
    ("dims", "groups", "dora"),
    [
        (1, 1, False),
        *(pytest.param(dims, 1, False, marks=pytest.mark.slow) for dims in (2, 3)),
        (2, 2, False),
        *((dims, 1, True) for dims in (1, 2, 3)),
    ],
)
def test_convolutions(dims, groups, dora, tmp_path):
    torch.manual_seed(0)
    base = TorchConvolutions(dims, groups)
    x = torch.randn(2, 4, *(9, 8, 7)[:dims])
    table = [*convolution("conv_first", "first", groups), *convolution("conv_second", "second")]
    to_ours = lambda w: np.moveaxis(w.detach().numpy(), (0, 1), (-1, -2))
    params = {
        f"conv_{name}": {"kernel": to_ours(layer.weight), "bias": layer.bias.detach().numpy()}
        for name, layer in (("first", base.first), ("second", base.second))
    }
    params = jax.tree.map(jnp.asarray, params)
    forward = jax_convolutions(groups)
    close(forward(params, x.numpy()), base(x).detach().numpy())

    make = pj.dora if dora else pj.lora
    method = make(rank=4, targets=["conv_first", "conv_second"], bias="adapted")
    frozen, initial = method.init(jax.random.key(0), params)
    trainable = noisy(initial)
    want = ours(forward, method, frozen, trainable, x.numpy())
    pj.export_peft(tmp_path / "ours", table, method, frozen, trainable)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(TorchConvolutions(dims, groups), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        close(loaded(x).numpy(), want)
    close(ours(forward, *pj.import_peft(tmp_path / "ours", table, params), x.numpy()), want)
    if groups > 1:
        return

    config = peft.LoraConfig(r=2, target_modules=["first", "second"], use_dora=dora, lora_bias=not dora)
    model = peft.get_peft_model(base, config)
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = model.eval()(x).numpy()
    close(ours(forward, *pj.import_peft(tmp_path / "theirs", table, params), x.numpy()), want)


def test_grouped_convolutions_whose_adapter_mixes_the_groups_are_refused(tmp_path):
    base = TorchConvolutions(1, 2)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    params = {"conv_first": {"kernel": jnp.zeros((3, 2, 8)), "bias": jnp.zeros(8)}}
    with pytest.raises(PeftError, match="mixes them"):
        pj.import_peft(tmp_path, convolution("conv_first", "first", groups=2), params)
