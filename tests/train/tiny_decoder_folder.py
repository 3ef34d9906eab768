"""A tiny random Llama folder with the tokenizer of `tiny_language`, and tiny files to train it on."""

import json

import jax
import tiny_language

from peftjax.models.llama import LLAMA
from peftjax.models.save import save
from peftjax.text.tokenizer import load_tokenizer

ANSWERS = {"the cat": " sat", "the dog": " is", "the mat": " was"}


def save_decoder(folder):
    """Write the folder; the weights are large enough that adapters alone can lower the loss."""
    tiny_language.save_tokenizer(folder, settings={"chat_template": tiny_language.CHATML})
    config = LLAMA.read_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": load_tokenizer(folder, decoder=True).vocab_size,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.5,
        }
    )
    model = LLAMA.build(config)
    save(folder, model, jax.jit(model.init)(jax.random.key(0)))
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_completions(path, count):
    """Rows whose prompt decides on the completion."""
    questions = list(ANSWERS)
    pairs = [(questions[i % len(questions)], i) for i in range(count)]
    return write_jsonl(path, [{"prompt": f"{q} {i % 7}", "completion": ANSWERS[q]} for q, i in pairs])
