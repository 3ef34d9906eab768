"""Adapters exchanged with the real PEFT library on every kind of family: the same logits both ways."""

import jax
import numpy as np
import pytest
from support import noisy

import peftjax as pj
from peftjax.cli.peft import export_saved, import_saved
from peftjax.core import tree
from peftjax.io.safetensors import find_tensors, read_tensors, write_tensors
from peftjax.models.save import save
from peftjax.train.saved_adapter import merge_saved, open_tuned

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
peft = pytest.importorskip("peft", reason="parity needs peft")

pytestmark = pytest.mark.parity

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TEXT, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}
# family -> (configuration, class, what PEFT is asked to adapt, what we are)
CASES = {
    "llama": (
        lambda: transformers.LlamaConfig(**LLAMA),
        "LlamaForCausalLM",
        {"target_modules": "all-linear"},
        "all-linear",
    ),
    "tied llama with its embedding": (
        lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        ["query", "embed/word"],
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=4),
        "Gemma3ForCausalLM",
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        ["query", "down"],
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32),
        "GPT2LMHeadModel",
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        "all-linear",
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(**TEXT, intermediate_size=24, max_position_embeddings=34),
        "RobertaForSequenceClassification",
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        ["query", "value"],
    ),
    "vit": (
        lambda: transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
        ),
        "ViTForImageClassification",
        {"target_modules": ["q_proj", "fc2"]},
        ["query", "value", "up", "output"],
    ),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
        "T5ForConditionalGeneration",
        {"target_modules": ["q", "wo"]},
        ["query", "down"],
    ),
}


def move(model, size):
    """Move whatever of a model of PEFT's is trained, as training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(folder of a random base, its class, PEFT's options, our targets, a batch)."""
    config, name, options, targets = CASES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    batch = {"input_ids": rng.integers(3, 50, (2, 9)).astype(np.int32)}
    if request.param == "vit":
        batch = {"pixel_values": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)}
    if request.param == "t5":
        batch["decoder_input_ids"] = rng.integers(3, 50, (2, 5)).astype(np.int32)
    return folder, name, options, targets, batch


def load_theirs(folder, name):
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def theirs(model, batch):
    inputs = {key: torch.tensor(value) for key, value in batch.items()}
    inputs = {key: value.long() if key.endswith("ids") else value for key, value in inputs.items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def ours(model, params, batch):
    return np.asarray(jax.jit(pj.adapt(model))(params, batch))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, np.abs(want).max()))


def test_what_we_export_computes_the_same_there(case, tmp_path):
    folder, name, _, targets, batch = case
    model, params = pj.load(folder)
    method = pj.lora(rank=4, targets=targets)
    frozen, initial = method.init(jax.random.key(0), params)
    trainable = noisy(initial, scale=0.2)
    pj.export_peft(tmp_path, model, method, frozen, trainable, base=str(folder))
    want = ours(model, method.apply(frozen, trainable), batch)
    assert np.abs(want - ours(model, params, batch)).max() > 1e-2
    close(theirs(peft.PeftModel.from_pretrained(load_theirs(folder, name), str(tmp_path)), batch), want)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request, tmp_path_factory):
    """(folder of a Llama, an adapter of PEFT's on it)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=request.param)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    options = {"r": 2, "target_modules": ["q_proj"], "use_dora": True, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(load_theirs(folder, "LlamaForCausalLM"), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return folder, model


IDS = {"input_ids": np.arange(6, dtype=np.int32).reshape(1, 6) + 3}


def as_imported(folder, path):
    model, params = pj.load(folder)
    method, frozen, trainable = pj.import_peft(path, model, params)
    return ours(model, method.apply(frozen, trainable), IDS), trainable


def test_tables_that_peft_only_stored_are_frozen(llama, tmp_path):
    folder, model = llama
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = model.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.add_(0.1)  # the file's tables count, as in PEFT
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    want = theirs(model, IDS)
    with torch.no_grad():
        table.copy_(kept)
    logits, trainable = as_imported(folder, tmp_path)
    close(logits, want)
    assert tree.count(trainable) == trains


@pytest.mark.parametrize(
    "spelt",
    [
        lambda name: (
            name.replace("lora_A.", "lora_A.mine.")
            .replace("lora_B.", "lora_B.mine.")
            .replace("lora_magnitude_vector", "lora_magnitude_vector.mine.weight")
        ),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
    ],
    ids=["an adapter's name", "a language model inside another"],
)
def test_keys_with_a_name_inside_are_read(spelt, llama, tmp_path):
    folder, model = llama
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = dict(read_tensors(find_tensors(file)))
    write_tensors(file, {spelt(name): tensor for name, tensor in tensors.items()})
    close(as_imported(folder, tmp_path)[0], theirs(model, IDS))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def t5(request, tmp_path_factory):
    """The folder of a T5, its output layer the table or not."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    if not request.param:
        model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(50, 16))
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return folder


TOKENS = {
    "input_ids": np.arange(6, dtype=np.int32).reshape(1, 6) + 3,
    "decoder_input_ids": np.arange(4, dtype=np.int32).reshape(1, 4),
}


@pytest.mark.parametrize("trained", [False, True], ids=["adapted", "trained"])
def test_the_table_of_t5_goes_where_its_forward_reads_it(trained, t5, tmp_path):
    model, params = pj.load(t5)
    method = pj.lora(rank=2, targets=["query", "embed/word"])
    if trained:
        method = pj.chain(pj.lora(rank=2, targets=["query"]), pj.unfreeze(["embed/word"]))
    frozen, initial = method.init(jax.random.key(0), params)
    trainable = noisy(initial, scale=0.2)
    pj.export_peft(tmp_path, model, method, frozen, trainable)
    want = ours(model, method.apply(frozen, trainable), TOKENS)
    close(
        theirs(
            peft.PeftModel.from_pretrained(load_theirs(t5, "T5ForConditionalGeneration"), str(tmp_path)),
            TOKENS,
        ),
        want,
    )
    method, frozen, trainable = pj.import_peft(tmp_path, model, params)
    close(ours(model, method.apply(frozen, trainable), TOKENS), want)


@pytest.mark.parametrize("options", [{"target_modules": ["q", "shared"]}, {"modules_to_save": ["shared"]}])
def test_a_table_of_t5_that_its_forward_never_calls_is_refused(options, t5, tmp_path):
    options = {"target_modules": ["q"], **options}
    model = peft.get_peft_model(
        load_theirs(t5, "T5ForConditionalGeneration"), peft.LoraConfig(r=2, **options)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = pj.load(t5)
    with pytest.raises(pj.PeftError, match=r"never calls.*encoder\.embed_tokens.*leave_out=\['shared'\]"):
        pj.import_peft(tmp_path, *loaded)
    method, frozen, trainable = pj.import_peft(tmp_path, *loaded, leave_out=["shared"])
    close(ours(loaded[0], method.apply(frozen, trainable), TOKENS), theirs(model, TOKENS))


def test_a_classifier_of_t5_has_the_names_of_its_class(tmp_path):
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, num_labels=2, eos_token_id=5, decoder_start_token_id=0)
    transformers.T5ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model, params = pj.load(tmp_path / "base")
    method = pj.lora(rank=2, targets=["query"])
    frozen, initial = method.init(jax.random.key(0), params)
    trainable = noisy(initial, scale=0.3)
    pj.export_peft(tmp_path / "ours", model, method, frozen, trainable)
    base = load_theirs(tmp_path / "base", "T5ForSequenceClassification")
    batch = {"input_ids": np.array([[7, 9, 11, 5]], np.int32)}
    want = ours(model, method.apply(frozen, trainable), batch)
    close(theirs(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")), batch), want)


def test_what_peft_saved_computes_the_same_here(case, tmp_path):
    folder, name, options, _, batch = case
    adapted = peft.get_peft_model(load_theirs(folder, name), peft.LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    model, params = pj.load(folder)
    method, frozen, trainable = pj.import_peft(tmp_path, model, params)
    close(ours(model, method.apply(frozen, trainable), batch), theirs(adapted, batch))


def bert_config():
    return transformers.BertConfig(**TEXT, intermediate_size=24, max_position_embeddings=32)


def small_t5():
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return transformers.T5Config(**sizes)


def llama_config(tied):
    return transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)


SMALL = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
# class -> (configuration of a tied model, its embedding and output layer, what is adapted)
TIED = {
    "LlamaForCausalLM": (
        lambda: llama_config(True),
        ["embed_tokens", "lm_head"],
        "q_proj",
    ),
    "GPT2LMHeadModel": (lambda: transformers.GPT2Config(**SMALL), ["wte", "lm_head"], "c_attn"),
    "BertForMaskedLM": (
        bert_config,
        ["word_embeddings", "predictions.decoder"],
        "query",
    ),
    "T5ForConditionalGeneration": (small_t5, ["embed_tokens", "lm_head"], "q"),
}


@pytest.mark.parametrize("both", [True, False], ids=["both", "the output layer alone"])
@pytest.mark.parametrize("name", TIED)
def test_tables_of_a_tied_model_that_peft_trained_apart(name, both, tmp_path):
    config, tables, target = TIED[name]
    batch = TOKENS if name.startswith("T5") else IDS
    torch.manual_seed(0)
    getattr(transformers, name)(config()).save_pretrained(tmp_path / "base")
    options = {"target_modules": [target], "modules_to_save": tables if both else tables[1:]}
    model = peft.get_peft_model(load_theirs(tmp_path / "base", name), peft.LoraConfig(r=2, **options))
    move(model, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(pj.PeftError, match=r"is the weight of .* load the model with untie=True \(--untie\)"):
        pj.import_peft(tmp_path / "adapter", *pj.load(tmp_path / "base"))
    backbone, params = pj.load(tmp_path / "base", untie=True)
    method, frozen, trainable = pj.import_peft(tmp_path / "adapter", backbone, params)
    want = theirs(model, batch)
    close(ours(backbone, method.apply(frozen, trainable), batch), want)
    pj.export_peft(tmp_path / "again", backbone, method, frozen, trainable)
    again = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base", name), str(tmp_path / "again"))
    close(theirs(again, batch), want)
    save(tmp_path / "merged", backbone, method.merge(frozen, trainable))
    close(theirs(load_theirs(tmp_path / "merged", name), batch), want)


def test_an_adapter_of_untied_tables_is_imported_evaluated_merged_and_exported(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    base = load_theirs(tmp_path / "base", "LlamaForCausalLM")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    move(model, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    import_saved(tmp_path / "theirs", str(tmp_path / "base"), tmp_path / "adapter", untie=True)
    tuned = open_tuned(tmp_path / "adapter")  # the adapter says that the model is untied
    params = tuned.adapter.method.apply(tuned.adapter.frozen, tuned.adapter.trainable)
    want = theirs(model, IDS)
    close(ours(tuned.model, params, IDS), want)
    merge_saved(tmp_path / "adapter", tmp_path / "merged")
    close(theirs(load_theirs(tmp_path / "merged", "LlamaForCausalLM"), IDS), want)
    export_saved(tmp_path / "adapter", tmp_path / "exported")
    base = load_theirs(tmp_path / "base", "LlamaForCausalLM")
    close(theirs(peft.PeftModel.from_pretrained(base, str(tmp_path / "exported")), IDS), want)


# Class, configuration, what is adapted, rows, whether the model is loaded untied.
ROWS = {
    "tied": ("LlamaForCausalLM", lambda: llama_config(True), "q_proj", [5, 3, 49], False),
    "untied": ("LlamaForCausalLM", lambda: llama_config(False), "q_proj", [5, 3], False),
    "both layers": (
        "LlamaForCausalLM",
        lambda: llama_config(False),
        "q_proj",
        {"embed_tokens": [5, 3], "lm_head": [7]},
        False,
    ),
    "a tied layer apart": (
        "LlamaForCausalLM",
        lambda: llama_config(True),
        "q_proj",
        {"embed_tokens": [5, 3], "lm_head": [7, 4, 1]},
        True,
    ),
    "tied, loaded untied": ("LlamaForCausalLM", lambda: llama_config(True), "q_proj", [5, 3], True),
    "gpt2": ("GPT2LMHeadModel", lambda: transformers.GPT2Config(**SMALL), "c_attn", [4], False),
    "t5": ("T5ForConditionalGeneration", small_t5, "q", [4, 6], False),
    "bert": (
        "BertForMaskedLM",
        bert_config,
        "query",
        {"word_embeddings": [4], "position_embeddings": [1]},
        False,
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_tables_that_peft_trains_by_themselves(case, tmp_path):
    name, config, target, indices, untie = ROWS[case]
    torch.manual_seed(0)
    getattr(transformers, name)(config()).save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=2, target_modules=[target], trainable_token_indices=indices)
    model = peft.get_peft_model(load_theirs(tmp_path / "base", name), options)
    move(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    batch = TOKENS if case == "t5" else {"input_ids": np.array([[5, 3, 4, 9, 7, 6]], np.int32)}
    want = theirs(model, batch)
    backbone, params = pj.load(tmp_path / "base", untie=untie)
    method, frozen, trainable = pj.import_peft(tmp_path / "adapter", backbone, params)
    close(ours(backbone, method.apply(frozen, trainable), batch), want)
    assert np.abs(want - ours(backbone, params, batch)).max() > 1e-2
    again = pj.import_peft(tmp_path / "adapter", backbone, method.merge(frozen, trainable))[0]
    assert again.config == method.config
    pj.export_peft(tmp_path / "ours", backbone, method, frozen, trainable)
    base = load_theirs(tmp_path / "base", name)
    close(theirs(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")), batch), want)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_biases_that_an_adapter_gives_to_layers_without_one(name, tmp_path):
    t5 = name.startswith("T5")
    torch.manual_seed(0)
    getattr(transformers, name)(small_t5() if t5 else llama_config(False)).save_pretrained(tmp_path / "base")
    targets = ["q", "k", "o", "wo"] if t5 else ["q_proj", "o_proj", "down_proj", "lm_head"]
    options = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, lora_bias=True)
    model = peft.get_peft_model(load_theirs(tmp_path / "base", name), options)
    move(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    batch = TOKENS if t5 else IDS
    want = theirs(model, batch)
    backbone, params = pj.load(tmp_path / "base")
    method, frozen, trainable = pj.import_peft(tmp_path / "adapter", backbone, params)
    close(ours(backbone, method.apply(frozen, trainable), batch), want)
    with pytest.raises(pj.PeftError, match=r"adds a bias to this layer, which has none .* cannot be merged"):
        method.merge(frozen, trainable)
    pj.export_peft(tmp_path / "ours", backbone, method, frozen, trainable)
    base = load_theirs(tmp_path / "base", name)
    close(theirs(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")), batch), want)


PARAMETERS = {
    "llama": ("LlamaForCausalLM", lambda: llama_config(False), ["mlp.up_proj.weight", "embed_tokens.weight"]),
    "gpt2": ("GPT2LMHeadModel", lambda: transformers.GPT2Config(**SMALL), ["c_attn.weight", "c_fc.weight"]),
    "bert": ("BertForMaskedLM", bert_config, ["query.weight", "position_embeddings.weight"]),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_factors_that_peft_gives_to_parameters_themselves(case, tmp_path):
    name, config, parameters = PARAMETERS[case]
    torch.manual_seed(0)
    getattr(transformers, name)(config()).save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[] if case == "gpt2" else ["o_proj" if case == "llama" else "key"],
        target_parameters=parameters,
        rank_pattern={parameters[0]: 3},
    )
    model = peft.get_peft_model(load_theirs(tmp_path / "base", name), options)
    move(model, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    want = theirs(model, IDS)
    backbone, params = pj.load(tmp_path / "base")
    method, frozen, trainable = pj.import_peft(tmp_path / "adapter", backbone, params)
    close(ours(backbone, method.apply(frozen, trainable), IDS), want)
    assert np.abs(want - ours(backbone, params, IDS)).max() > 1e-2
    pj.export_peft(tmp_path / "ours", backbone, method, frozen, trainable)
    base = load_theirs(tmp_path / "base", name)
    close(theirs(peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")), IDS), want)


def test_an_adapter_of_a_resized_vocabulary_is_imported_with_its_size(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama_config(True)).save_pretrained(tmp_path / "base")
    base = load_theirs(tmp_path / "base", "LlamaForCausalLM")
    base.resize_token_embeddings(53)
    options = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[50, 51, 52]
    )
    model = peft.get_peft_model(base, options)
    move(model, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(pj.PeftError, match=r"vocab_size=53 \(--vocab-size\)|vocab_size=N"):
        import_saved(tmp_path / "theirs", str(tmp_path / "base"), tmp_path / "adapter")
    import_saved(tmp_path / "theirs", str(tmp_path / "base"), tmp_path / "adapter", vocab_size=53)
    tuned = open_tuned(tmp_path / "adapter")
    params = tuned.adapter.method.apply(tuned.adapter.frozen, tuned.adapter.trainable)
    batch = {"input_ids": np.array([[5, 52, 4, 50, 7, 51]], np.int32)}
    close(ours(tuned.model, params, batch), theirs(model, batch))
