"""A tiny BERT folder and tiny labeled files, so that commands run in seconds."""

import csv
import random

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from peftjax.models.bert import bert
from peftjax.models.bert_config import BertConfig
from peftjax.models.save import save

GOOD = ["bright", "clever", "gentle", "honest", "joyful", "kind", "lively", "noble"]
BAD = ["awful", "bitter", "cruel", "dreary", "empty", "feeble", "grim", "harsh"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_model(folder, layers):
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *GOOD, *BAD])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model = bert(config, head="none")
    save(folder, model, jax.jit(model.init)(jax.random.key(0)))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("other"), layers=3)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def rows(count):
        for number in range(count):
            label, words = (("good", GOOD), ("bad", BAD))[number % 2]
            yield " ".join(draw.choices(words, k=6)), label

    write_csv(folder / "train.csv", rows(64))
    write_csv(folder / "dev.csv", rows(21))
    write_csv(folder / "unseen.csv", [("bright", "good"), ("grim", "ugly")])
    write_csv(folder / "no_label.csv", [("bright",), ("grim",)])
    return folder
