"""Damaged files of a model's folder, with a fixed seed: each is read, or refused with a PeftError."""

import json

import jax
import pytest
import tokenizers
from kinds import Kind, check, check_accidents
from mutations import damaged_json
from support import quick_at

from peftjax.models.families import read_family
from peftjax.text.tokenizer import load_tokenizer

CASES = 200
ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "id2label": {"0": "a", "1": "b"},
    "architectures": ["BertForSequenceClassification"],
}
DECODER = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "resid_pdrop": 0.0}
IMAGE = {**ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 3}
OPT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
CONFIGS = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "vit": IMAGE,
    "llama": DECODER,
    "qwen2": DECODER,
    "gemma3_text": {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt_oss": {**DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**DECODER, "moe_intermediate_size": 8, "num_experts": 8, "mlp_only_layers": []},
    "mixtral": {**DECODER, "num_local_experts": 4, "sliding_window": 7},
    "t5": T5,
    "gpt2": GPT2,
    "opt": OPT,
}
TOKENIZER = "tokenizer_config.json"


def config_of(name):
    values = {"model_type": name, **CONFIGS[name]}
    return lambda folder: (folder / "config.json").write_text(json.dumps(values))


def read_config(folder):
    """The configuration and, where it is small, the shapes of the model."""
    family, values = read_family(folder)
    model = family.build(family.read_config(values), head="none", dtype="float32", remat=None)
    if model.num_layers < 100:
        jax.eval_shape(model.init, jax.random.key(0))


def tokenizer(folder):
    texts = ["the quick brown fox jumps over the lazy dog"] * 5
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    added = {"0": {"content": "<s>", "special": True}}
    settings = {
        **names,
        "added_tokens_decoder": added,
        "chat_template": "{{ messages }}",
        "model_max_length": 9,
    }
    (folder / TOKENIZER).write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": made.token_to_id("<pad>")}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "pad_token_id": 2}))


def read_tokenizer(folder):
    load_tokenizer(folder, decoder=True).encode(["the dog"], max_length=8)


TOKENIZERS = (
    "tokenizer.json",
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
KINDS = {name: Kind("config.json", config_of(name), damaged_json, read_config) for name in CONFIGS}
KINDS |= {file: Kind(file, tokenizer, damaged_json, read_tokenizer) for file in TOKENIZERS}


@pytest.mark.parametrize("name", quick_at(KINDS, every=6))
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    check(KINDS[name], CASES // len(KINDS) + 1, tmp_path)


@pytest.mark.parametrize("name", ["bert", *TOKENIZERS])
def test_what_is_no_file_is_refused_at_once(name, tmp_path):
    check_accidents(KINDS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_five_times_as_many(name, tmp_path):
    check(KINDS[name], 5 * CASES // len(KINDS) + 1, tmp_path)
