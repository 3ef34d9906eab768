"""Which task a run is, what it takes, and the options that the task decides."""

import json
from dataclasses import replace

import pytest
import tiny_decoder_folder
import tiny_language

from peftjax.core.errors import PeftError
from peftjax.train.config import TrainConfig, with_defaults
from peftjax.train.data.files import data_file
from peftjax.train.data.language.dataset import RowOptions
from peftjax.train.open import find_base, longest_text
from peftjax.train.options import DataOptions, ModelOptions, RunOptions
from peftjax.train.tasks.find import find_task

ROWS = {
    "labeled.jsonl": {"text": "the cat", "label": "a"},
    "texts.jsonl": {"text": "the cat"},
    "chats.jsonl": {"messages": tiny_language.CHAT, "label": "a"},
    "dolly.jsonl": {"instruction": "a", "response": "b", "category": "c"},
    "rated.jsonl": {"text": "the cat", "stars": 3},
}


CONFIGS = {
    "encoder": {
        "model_type": "bert",
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
    },
    "decoder": {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configurations are enough to decide on the task."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, values in CONFIGS.items():
        (folders[name] / "config.json").write_text(json.dumps(values))
    data = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        tiny_decoder_folder.write_jsonl(data / name, [row])
    (data / "book.txt").write_text("the cat sat")
    return {**folders, "data": data}


def options_of(folders, model, data, *, rows=None, head=None, task=None, **texts):
    data = data if data in ("docstrings", "tfds:imdb") else str(folders["data"] / data)
    return RunOptions(
        task=task,
        base=ModelOptions(model=str(folders[model]), head=head),
        texts=DataOptions(data=data, **texts),
        rows=rows or RowOptions(),
    )


def task_of(options):
    return find_task(options, find_base(options.base.model), data_file(options.texts.data))


@pytest.mark.parametrize(
    ("model", "data", "given", "task"),
    [
        ("encoder", "labeled.jsonl", {}, "classification"),
        ("encoder", "rated.jsonl", {"label_column": "stars"}, "classification"),
        ("decoder", "labeled.jsonl", {}, "classification"),
        ("decoder", "docstrings", {}, "classification"),
        ("decoder", "tfds:imdb", {}, "classification"),
        ("decoder", "texts.jsonl", {}, "language"),
        ("decoder", "book.txt", {}, "language"),
        ("decoder", "chats.jsonl", {}, "language"),
        ("decoder", "dolly.jsonl", {}, "language"),
        ("decoder", "rated.jsonl", {}, "language"),
        ("decoder", "rated.jsonl", {"label_column": "stars"}, "classification"),
        ("decoder", "labeled.jsonl", {"source": "corpus"}, "language"),
        ("decoder", "labeled.jsonl", {"task": "language"}, "language"),
        ("decoder", "labeled.jsonl", {"task": "language", "head": "causal_lm"}, "language"),
        ("decoder", "texts.jsonl", {"rows": RowOptions(packed=True)}, "language"),
    ],
)
def test_model_and_data_decide(folders, model, data, given, task):
    assert task_of(options_of(folders, model, data, **given)) == task


@pytest.mark.parametrize(
    ("model", "data", "given", "says"),
    [
        (
            "encoder",
            "texts.jsonl",
            {"task": "language"},
            r"writes no text: give a decoder \(llama",
        ),
        ("encoder", "texts.jsonl", {}, "no label column .* or give a decoder as the model"),
        ("encoder", "book.txt", {}, "no label column"),
        ("decoder", "texts.jsonl", {"task": "langauge"}, "no task is called 'langauge'; closest: 'language'"),
        ("decoder", "docstrings", {"task": "language"}, "'docstrings' is for the task classification"),
        ("decoder", "texts.jsonl", {"label_column": "stars", "task": "language"}, "no use for label_column"),
        ("decoder", "texts.jsonl", {"head": "classifier"}, "trains the head 'causal_lm', not 'classifier'"),
        (
            "encoder",
            "labeled.jsonl",
            {"rows": RowOptions(packed=True)},
            "has no use for packed",
        ),
        ("encoder", "labeled.jsonl", {"prompt_column": "a"}, "classification has no use for prompt_column"),
        ("decoder", "missing.jsonl", {}, "missing.jsonl does not exist"),
    ],
)
def test_what_cannot_be_is_refused(folders, model, data, given, says):
    with pytest.raises(PeftError, match=says):
        task_of(options_of(folders, model, data, **given))


def test_the_task_decides_on_defaults():
    given = TrainConfig(learning_rate=1.0)
    found = with_defaults(given, "language")
    assert (found.max_length, found.learning_rate, found.best_by) == (512, 1.0, "loss")
    found = with_defaults(TrainConfig(), "classification")
    assert (found.max_length, found.learning_rate, found.best_by) == (64, 2e-3, "accuracy")


def test_no_text_is_longer_than_the_model_was_made_for(folders):
    longest = longest_text(find_base(folders["decoder"]))
    assert longest == 64
    assert with_defaults(TrainConfig(), "language", longest).max_length == 64
    with pytest.raises(PeftError, match="max_length is 65, but the model was made for at most 64"):
        with_defaults(replace(TrainConfig(), max_length=65), "language", longest)
