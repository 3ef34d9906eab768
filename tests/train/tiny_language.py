"""A byte-level BPE tokenizer trained on a few lines, and small chat templates in the usual styles."""

import json

import pytest

from peftjax.text.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in peftjax[train]")
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot|>")
SPECIAL += ("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>")
LINES = (
    "the cat sat on the mat and the dog sat on the cat",
    "what is the answer to the question? the answer is here.",
    "user assistant system model\nyou are a helpful assistant\n\nhello there, how are you?",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{- bos_token }}\n"
    "{%- if tools is not none and tools %}{{ tools | tojson(indent=2) }}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|header|>' + message.role + '<|end_header|>\n\n' + message['content'] | trim + '<|eot|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|header|>assistant<|end_header|>\n\n' }}{%- endif %}\n"
)
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user and assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{{ ' ' + message['content'] + eos_token }}{% endif %}
{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% if loop.last %}{{ message.content }}{% else %}{{ message.content.split('</think>')[-1] }}{% endif %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA}
END_OF_TURN = {"chatml": "<|im_end|>", "llama": "<|eot|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
"""What the model has to write at the end of a turn."""

CHAT = [
    {"role": "user", "content": "what is the answer?"},
    {"role": "assistant", "content": "the answer is here.\nthe cat."},
    {"role": "user", "content": "hello there <b> & é"},
    {"role": "assistant", "content": "how are you?"},
]


def save_tokenizer(folder, *, bos=False, settings=None, metaspace=False):
    """Write tokenizer.json and tokenizer_config.json; `metaspace` puts a space in front as Llama 2 does."""
    backend = tokenizers.Tokenizer(models.BPE())
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({letter for line in LINES for letter in line})
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>"}
    named = {"bos_token": "<s>", "eos_token": eos, **(settings or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def tokenizer(folder, **options):
    return load_tokenizer(save_tokenizer(folder, **options), decoder=True)
