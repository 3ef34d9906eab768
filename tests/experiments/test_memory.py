"""The memory experiment on a tiny encoder, compiled for a CPU, and the pace of methods."""

import json

import jax.numpy as jnp
import pytest

from experiments.memory import run, subjects, sweep
from experiments.memory.report import claims, report
from experiments.memory.subjects import Subject
from experiments.tuning.pace import measure_pace, pace_table
from peftjax.core import tree
from peftjax.models.bert import BertConfig, bert


def build(layers, dtype):
    config = BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=layers or 2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return bert(config, head="classifier", dtype=dtype)


TINY = Subject("tiny", build, 2, 8, "float32")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(run, "SUBJECTS", (TINY,))
    monkeypatch.setattr(sweep, "SUBJECT", TINY)


@pytest.mark.slow
def test_it_writes_what_it_measured_and_keeps_what_it_did_not(tiny, tmp_path):
    options = {"output": tmp_path, "target": "cpu", "subjects": ("tiny",)}
    run.main(run.Options(**options, rows=("LoRA",)))
    run.main(run.Options(**options, rows=("full", "LoRA + remat")))
    rows = json.loads((tmp_path / "memory.json").read_text())["tiny"]
    assert list(rows) == ["LoRA", "full", "LoRA + remat"]
    assert rows["full"]["bytes"]["optimizer"] > 2 * 4 * rows["full"]["trainable_parameters"]
    assert rows["LoRA + remat"]["kept"] < rows["LoRA"]["kept"]
    assert rows["LoRA + remat"]["flops"] > rows["LoRA"]["flops"]
    assert (tmp_path / "memory.png").stat().st_size > 0
    assert "| LoRA + remat |" in (tmp_path / "memory.md").read_text()


def test_a_method_that_a_model_does_not_have_stands_below_the_table_with_the_reason():
    plan = {"peak": 1, "kept": 1, "flops": 1, "trainable_parameters": 1, "device": "cpu", "jax": "0"}
    sizes = dict.fromkeys(("weights", "method_state", "trainable", "optimizer", "temporaries"), 1)
    text = report({"tiny": {"full": {**plan, "bytes": sizes}, "LoRA": {"reason": "it has no weights"}}})
    assert "\n- LoRA: it has no weights\n" in text
    assert text.count("| full |") == 1


def test_a_claim_that_does_not_hold_is_said_not_to():
    held = {"full": {"peak": 100, "kept": 100}, "LST 1/8": {"peak": 30, "kept": 1}}
    missed = {"full": {"peak": 100, "kept": 100}, "LST 1/8": {"peak": 32, "kept": 1}}
    assert claims({"a": held}) == ["LST 1/8, 69% less in all than full: confirmed (a 70.0%)."]
    assert "not confirmed on all (a 70.0%, b 68.0%)" in claims({"a": held, "b": missed})[0]


@pytest.mark.slow
def test_a_sweep_measures_only_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SHOWN", ("LoRA",))
    options = sweep.Options(tmp_path, "cpu", depths=(1, 3), lengths=(8, 16))
    sweep.main(options)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["layers"]["LoRA"]["3"] > found["layers"]["LoRA"]["1"]
    assert found["tokens"]["LoRA"]["16"] > found["tokens"]["LoRA"]["8"]
    monkeypatch.setattr(sweep, "measure", None)  # a call of it fails
    sweep.main(options)
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_the_subjects_have_the_sizes_of_their_names():
    millions = {subject.name: _parameters(subject) / 1e6 for subject in subjects.SUBJECTS}
    assert millions["RoBERTa-large"] == pytest.approx(355, rel=0.02)
    assert millions["ViT-L/16"] == pytest.approx(304, rel=0.01)
    assert millions["Llama-3-8B"] == pytest.approx(8030, rel=0.001)


def _parameters(subject):
    return tree.count(subject.params(subject.model()))


def test_pace_runs_every_method_once_a_round_after_the_first_step():
    done = []

    def step(label):
        return lambda: done.append(label) or jnp.zeros(())

    seconds = measure_pace({"a": step("a"), "b": step("b")}, rounds=2)
    assert done == ["a", "b", "a", "b", "a", "b"]
    assert [len(taken) for taken in seconds.values()] == [2, 2]
    assert "| b | 2000 | 2.00 [1.00, 4.00] |" in pace_table({"a": [1, 2, 0.5], "b": [2, 2, 2]}, "a")
