"""Damaged files, with a fixed seed: each is read, or refused with a PeftError, and within seconds.

The files of a model's folder are in `test_fuzz_models.py`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kinds import Kind, check, check_accidents
from mutations import damaged_bytes, damaged_json, damaged_lines, damaged_tensors
from support import quick_at

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.cli.parse import parse
from peftjax.core.errors import PeftError
from peftjax.hf.config import read_config
from peftjax.io.safetensors import describe_tensors, find_tensors, read_tensors, write_tensors
from peftjax.models.llama import LLAMA
from peftjax.models.weight_map import linear
from peftjax.train.adapter_info import read_info
from peftjax.train.data.files import file_dataset, read_rows
from peftjax.train.data.language.conversations import read_conversations
from peftjax.train.data.language.corpus import read_corpus
from peftjax.train.metrics import cut, read_metrics
from peftjax.train.output_folder import claim_folder

CASES = 300
PARAMS = {
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
    "up": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)},
}
TABLE = [*linear("head", "head"), *linear("up", "up")]
IDENTITY = {"method": {"name": "lora", "rank": 2}, "model": "0" * 64, "training": {"seed": 0}}
INFO = {
    "model": "m",
    "head": "classifier",
    "labels": ["a", "b"],
    "max_length": 64,
    "task": "language",
    "rows": {"separator": " ", "packed": True},
}
YAML = "rank: 2\nlearning_rate: 1e-3\ntargets: [query, value]\nsteps: 5\nmodel: m\npacked: true\n"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def adapter(folder):
    method = pj.chain(pj.lora(rank=2, rank_pattern={"up": 1}, targets="head|up"), pj.unfreeze(["head/bias"]))
    save_adapter(folder, method, *method.init(jax.random.key(0), PARAMS), seed=0, info=INFO)


def peft(folder):
    pj.export_peft(folder, TABLE, *exported())


def exported():
    method = pj.lora(rank=2, targets=["head"])
    return method, *method.init(jax.random.key(0), PARAMS)


@functools.cache
def decoder():
    config = LLAMA.read_config(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        }
    )
    model = LLAMA.build(config, head="causal_lm")
    return model, jax.jit(model.init)(jax.random.key(0))


def prefix(folder):
    model, params = decoder()
    method = pj.prefix(length=3, mlp_size=None)
    pj.export_peft(folder, model, method, *method.init(jax.random.key(0), params))


def read_prefix(folder):
    pj.import_peft(folder, *decoder())


def parquet(rows):
    return lambda folder: pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def shards(folder):
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)}
    write_tensors(folder / "x.safetensors", tensors, {"format": "pt"})
    index = {"metadata": {"total_size": 28}, "weight_map": dict.fromkeys(tensors, "x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def read_shards(folder):
    found = find_tensors(folder)
    describe_tensors(found)
    dict(read_tensors(found))


def read_options(folder):
    parse(["train", "--config", str(folder / "run.yaml")])


ROWS = "".join(json.dumps({"text": f"t {i}", "label": "ab"[i % 2]}) + "\n" for i in range(80))
CSV = "text,label\n" + "".join(f'"t, {i}",{"ab"[i % 2]}\n' for i in range(80))
TSV = "text\tlabel\n" + "".join(f"t {i}\t{'ab'[i % 2]}\n" for i in range(80))
CHATS = "".join(json.dumps({"messages": CHAT, "tools": []}) + "\n" for _ in range(3))
METRICS = '{"step": 1, "loss": 0.5, "tokens_per_second": null}\n{"step": 2, "tokens_per_second": 5.0}\n'
KINDS = [
    Kind("adapter.json", adapter, damaged_json, lambda f: load_adapter(f, PARAMS)),
    Kind("adapter.json", adapter, damaged_json, read_info),
    Kind("adapter.safetensors", adapter, damaged_tensors, lambda f: load_adapter(f, PARAMS)),
    Kind("adapter_config.json", peft, damaged_json, read_config),
    Kind("adapter_config.json", peft, damaged_json, lambda f: pj.import_peft(f, TABLE, PARAMS)),
    Kind("adapter_model.safetensors", peft, damaged_tensors, lambda f: pj.import_peft(f, TABLE, PARAMS)),
    Kind("run.json", lambda f: claim_folder(f, IDENTITY), damaged_json, lambda f: claim_folder(f, IDENTITY)),
    Kind(
        "metrics.jsonl", text("metrics.jsonl", METRICS), damaged_lines, lambda f: cut(f / "metrics.jsonl", 1)
    ),
    Kind(
        "metrics.jsonl",
        text("metrics.jsonl", METRICS),
        damaged_lines,
        lambda f: read_metrics(f / "metrics.jsonl"),
    ),
    Kind("run.yaml", text("run.yaml", YAML), damaged_bytes, read_options),
    Kind(
        "rows.jsonl",
        text("rows.jsonl", ROWS),
        damaged_lines,
        lambda f: file_dataset(str(f / "rows.jsonl"), None),
    ),
    Kind("rows.csv", text("rows.csv", CSV), damaged_bytes, lambda f: file_dataset(str(f / "rows.csv"), None)),
    Kind("rows.tsv", text("rows.tsv", TSV), damaged_bytes, lambda f: file_dataset(str(f / "rows.tsv"), None)),
    Kind(
        "rows.parquet",
        parquet([{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(80)]),
        damaged_bytes,
        lambda f: file_dataset(str(f / "rows.parquet"), None),
    ),
    Kind(
        "rows.parquet",
        parquet([{"messages": CHAT, "tools": None}] * 3),
        damaged_bytes,
        lambda f: read_conversations(f / "rows.parquet"),
    ),
    Kind(
        "run.txt", text("run.txt", "the cat sat\n" * 9), damaged_bytes, lambda f: read_corpus(f / "run.txt")
    ),
    Kind("adapter_config.json", prefix, damaged_json, read_prefix),
    Kind("adapter_model.safetensors", prefix, damaged_tensors, read_prefix),
    Kind(
        "chats.jsonl",
        text("chats.jsonl", CHATS),
        damaged_lines,
        lambda f: read_conversations(f / "chats.jsonl"),
    ),
    Kind(
        "rows.json",
        text("rows.json", json.dumps([{"text": "a"}] * 3)),
        damaged_json,
        lambda f: read_rows(f / "rows.json"),
    ),
    Kind("x.safetensors", shards, damaged_tensors, read_shards),
    Kind("model.safetensors.index.json", shards, damaged_json, read_shards),
]


NAMES = [f"{number}-{kind.file}" for number, kind in enumerate(KINDS)]


@pytest.mark.parametrize("kind", quick_at(KINDS, every=6), ids=NAMES)
def test_a_damaged_file_is_read_or_refused(kind, tmp_path):
    check(kind, CASES // len(KINDS) + 1, tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    check_accidents(kind, tmp_path)


def test_a_zero_byte_in_the_name_of_a_shard_is_refused(tmp_path):
    shards(tmp_path)
    index = {"weight_map": {"a": "x\0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PeftError, match="is not a complete safetensors file"):
        read_shards(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_ten_times_as_many(kind, tmp_path):
    check(kind, 10 * CASES // len(KINDS) + 1, tmp_path)
