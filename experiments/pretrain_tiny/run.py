"""A small Llama trained from scratch on a text file, so that there is a decoder without any download.

    python -m experiments.pretrain_tiny.run --output tiny

It trains a byte-level BPE tokenizer, draws a Llama at random and trains all of it (`pj.full()`) with the
loop of `peftjax train`. Without `--data` the text is the docstrings of this Python's standard library. What
it leaves is an ordinary Hugging Face folder. The same command again continues a run that was stopped.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from peftjax.cli import report
from peftjax.core.errors import PeftError
from peftjax.models.llama import LLAMA
from peftjax.models.save import save
from peftjax.train.config import TrainConfig
from peftjax.train.data.docstrings import docstring_dataset
from peftjax.train.data.language.corpus import read_corpus
from peftjax.train.options import DataOptions, MethodOptions, ModelOptions, RunOptions
from peftjax.train.run import run
from peftjax.train.saved_adapter import merge_saved
from peftjax.train.write import ADAPTER

BOS, EOS, PAD, START, END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Options:
    """What to train, on what and for how long."""

    output: Path
    """The Hugging Face folder to write; the run itself is in its folder 'run'."""
    data: Path | None = None
    """A text file, or a table with a text column; by default this Python's docstrings, in which the names
    of the largest packages are masked."""
    vocab_size: int = 4096
    """Entries of the tokenizer."""
    width: int = 192
    """Width of the model; a head has 32."""
    layers: int = 4
    """Blocks."""
    length: int = 128
    """Tokens of a row, and the longest text that the model is made for."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Rows a step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Of the initial values and the order of the data."""


def pretrain(options: Options) -> dict[str, Any]:
    """Train, write the folder, and return the run's summary.

    Raises:
        PeftError: the data or an option cannot be used.
    """
    work = options.output / "run"
    start = work / "start"
    start.mkdir(parents=True, exist_ok=True)
    data = options.data or _docstrings(work)
    write_tokenizer(start, read_corpus(data), options.vocab_size)
    write_model(start, options)
    summary = run(
        RunOptions(
            task="language",
            texts=DataOptions(data=str(data)),
            base=ModelOptions(model=str(start)),
            tuning=MethodOptions(method="full"),
            training=TrainConfig(
                steps=options.steps,
                batch_size=options.batch_size,
                eval_batch_size=options.batch_size,
                max_length=options.length,
                learning_rate=options.learning_rate,
                schedule="cosine",
                weight_decay=0.1,
                eval_every=100,
                save_every=100,
                seed=options.seed,
            ),
            output=work,
        ),
        say=lambda line: print(line, file=sys.stderr),
    )
    merge_saved(work / ADAPTER, options.output)
    return summary


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    """Train a byte-level BPE on the texts; write it with its special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    ids = [(BOS, backend.token_to_id(BOS))]
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    stops = [backend.token_to_id(token) for token in (EOS, END)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}) + "\n")


def write_model(folder: Path, options: Options) -> None:
    """Draw a Llama for the tokenizer in the folder, and write it there."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    heads, left = divmod(options.width, 32)
    if heads < 1 or left:
        raise PeftError(f"width is {options.width}, but has to be a multiple of 32, the width of a head")
    values = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": options.width,
        "intermediate_size": 8 * options.width // 3,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    model = LLAMA.build(LLAMA.read_config(values))
    save(folder, model, jax.jit(model.init)(jax.random.key(options.seed)))


def _docstrings(folder: Path) -> Path:
    """The docstrings as a table, a document a row."""
    found = docstring_dataset()
    file = folder / "docstrings.jsonl"
    rows = (json.dumps({"text": text}) for split in (found.train, found.evaluation) for text in split.texts)
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report.print_summary(pretrain(tyro.cli(Options, description=__doc__)))
    except PeftError as error:
        Console(stderr=True, highlight=False).print(str(error))
        sys.exit(2)
