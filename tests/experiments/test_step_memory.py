"""The memory experiment on tiny models, compiled for a CPU."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from support import KEY

import peftjax as pj
from experiments.harness.memory import fill
from experiments.step_memory import blocks, depth, pretraining, sparse
from experiments.step_memory.masked import masked
from experiments.step_memory.models import SIZES, Size, block_models, roberta_model, vit_model
from peftjax.core import tree
from peftjax.models.vit import ViTConfig

ENCODER = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TINY = roberta_model("tiny", ENCODER, 2, 8)
VIT = vit_model("tiny", ViTConfig(16, 2, 2, 32, image_size=(8, 8), patch_size=(4, 4)), 2, classes=3)
LLAMA = (Size("60M", 32, 48, 2, 2, 4, (0.36, 0.24)),)


def plans(folder, model):
    return json.loads((folder / "results.json").read_text())["plans"][model]


@pytest.mark.slow
def test_it_writes_what_it_measured_and_keeps_what_it_did_not(tmp_path):
    table = blocks.make_table((TINY,))
    fill(table, tmp_path, "cpu", contenders=("LoRA",))
    fill(table, tmp_path, "cpu", models=("tiny",), contenders=("full", "LoRA + remat"))
    rows = plans(tmp_path, "tiny")
    assert list(rows) == ["LoRA", "full", "LoRA + remat"]
    assert rows["full"]["bytes"]["optimizer"] > 2 * 4 * rows["full"]["trainable_parameters"]
    assert rows["LoRA + remat"]["kept"] < rows["LoRA"]["kept"]
    assert rows["LoRA + remat"]["flops"] > rows["LoRA"]["flops"]
    assert (tmp_path / "results.png").stat().st_size > 0
    assert "| LoRA + remat |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_the_sparse_methods_are_measured_with_the_head(tmp_path):
    text = fill(sparse.make_table((VIT,)), tmp_path, "cpu", contenders=("LoRA-8", "full", "masked"))
    rows = plans(tmp_path, "tiny")
    assert list(rows) == ["full", "LoRA-8", "masked"]
    weights = rows["full"]["bytes"]["trainable"]
    linear = 2 * 4 * (4 * 16 * 16 + 2 * 16 * 32)
    assert rows["masked"]["bytes"]["method_state"] == linear // 4  # a byte each
    assert rows["masked"]["bytes"]["trainable"] == linear + 4 * (16 * 3 + 3 + 16)
    assert rows["full"]["peak"] > 3 * weights > rows["LoRA-8"]["bytes"]["weights"]
    assert "batch 2, 224 x 224" in text
    assert "| masked |" in text


def test_autodiff_of_the_formula_is_asked_of_the_first_model_alone():
    table = sparse.make_table((VIT, dataclasses.replace(VIT, name="larger")))
    naive = next(one for one in table.contenders if one.label == sparse.NAIVE)
    assert [table.asked(model, naive) for model in table.models] == [True, False]


@pytest.mark.slow
def test_only_what_is_missing_is_measured_where_that_is_asked(tmp_path, monkeypatch):
    table = depth.make_table(TINY, depths=(1, 3), lengths=(8, 16))
    fill(table, tmp_path, "cpu", contenders=("LoRA",))
    found = {name: plans(tmp_path, name)["LoRA"]["working"] for name in ("1 layers", "3 layers")}
    assert found["3 layers"] > found["1 layers"]
    assert plans(tmp_path, "16 tokens")["LoRA"]["working"] > plans(tmp_path, "8 tokens")["LoRA"]["working"]
    monkeypatch.setattr("experiments.harness.memory.measure", None)  # a call of it fails
    fill(table, tmp_path, "cpu", contenders=("LoRA",), missing=True)
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.slow
def test_memory_counts_all_that_lies_beside_the_weights(tmp_path):
    table = pretraining.make_table(LLAMA)
    fill(table, tmp_path, "cpu", contenders=("AdamW",))
    text = fill(table, tmp_path, "cpu", contenders=("LoRA",))
    rows = plans(tmp_path, "60M")
    assert rows["AdamW"]["beside"] == 2 * rows["AdamW"]["model"] + 4  # and a step count
    factors = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))  # of two layers, rank 4
    rest = rows["AdamW"]["model"] - 2 * 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert rows["LoRA"]["beside"] == 3 * 4 * factors + 2 * rest + 4  # factors are float32
    assert "60M, AdamW, weights and state: the paper 0.36 G" in text
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.slow
def test_programs_between_steps_are_measured(tmp_path):
    fill(pretraining.make_table(LLAMA), tmp_path, "cpu", contenders=("GaLore",))
    row = plans(tmp_path, "60M")["GaLore"]
    assert len(row["between"]) == 7  # one for each of the block's weights
    assert all(peak > row["model"] + row["beside"] for peak in row["between"])


def test_a_method_that_a_model_does_not_have_stands_below_the_table_with_the_reason():
    plan = {"peak": 1, "kept": 1, "flops": 1, "trainable_parameters": 1, "device": "cpu", "jax": "0"}
    sizes = dict.fromkeys(("weights", "method_state", "trainable", "optimizer", "temporaries"), 1)
    text = blocks.report(
        {"tiny": {"full": {**plan, "bytes": sizes}, "LoRA": {"reason": "it has no weights"}}}
    )
    assert "\n- LoRA: it has no weights\n" in text
    assert text.count("| full |") == 1


def test_a_claim_of_a_method_of_blocks_that_does_not_hold_is_said_not_to():
    held = {"full": {"peak": 100, "kept": 100}, "LST 1/8": {"peak": 30, "kept": 1}}
    missed = {"full": {"peak": 100, "kept": 100}, "LST 1/8": {"peak": 32, "kept": 1}}
    assert blocks.claims({"a": held}) == ["LST 1/8, 69% less in all than full: confirmed (a 70.0%)."]
    assert "not confirmed on all (a 70.0%, b 68.0%)" in blocks.claims({"a": held, "b": missed})[0]


def parameters(model):
    return tree.count(model.params(model.backbone()))


@pytest.mark.slow
def test_the_models_have_the_sizes_of_their_names():
    millions = {model.name: parameters(model) / 1e6 for model in block_models()}
    assert millions["RoBERTa-large"] == pytest.approx(355, rel=0.02)
    assert millions["ViT-L/16"] == pytest.approx(304, rel=0.01)
    assert millions["Llama-3-8B"] == pytest.approx(8030, rel=0.001)
    millions = {size.name: parameters(size.model) / 1e6 for size in SIZES}
    assert millions["60M"] == pytest.approx(58, rel=0.01)
    assert millions["130M"] == pytest.approx(134, rel=0.01)
    assert millions["350M"] == pytest.approx(368, rel=0.01)
    assert millions["1B"] == pytest.approx(1339, rel=0.01)
    assert millions["7B"] == pytest.approx(6738, rel=0.01)


def test_only_masked_entries_are_trained():
    params = {"up": {"kernel": jnp.ones((6, 8))}, "bias": jnp.ones(8)}
    method = masked(share=0.5)
    frozen, trainable = method.init(KEY, params)
    mask = frozen.state["up/kernel"]
    tx = optax.adamw(0.1, weight_decay=0.0)
    square = pj.adapt(lambda p, x: jnp.sum((x @ p["up"]["kernel"]) ** 2))
    loss = lambda t: square(method.apply(frozen, t), jnp.ones((2, 6)))
    updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
    assert 0 < mask.sum() < mask.size
    assert bool(((updates["up/kernel"] != 0) == mask).all())


def plan(peak, **sizes):
    return {"peak": peak, "bytes": sizes}


def test_a_claim_of_a_sparse_method_that_does_not_hold_is_said_not_to():
    held = {"LoRA-8": plan(100), "SNELL-8": plan(109), "masked": plan(200), "SNELL-32": plan(137)}
    missed = {"LoRA-8": plan(100), "SNELL-8": plan(111), "masked": plan(200), "SNELL-32": plan(137)}
    assert [": confirmed (" in line for line in sparse.claims({"ViT-B/16": held})] == [True, True]
    both = sparse.claims({"ViT-B/16": held, "ViT-L/16": missed})
    assert [": not confirmed (" in line for line in both] == [True, True]
    assert both[0].endswith("(ViT-B/16 +9.0%, ViT-L/16 +11.0%).")


def test_the_papers_numbers_are_its_claim():
    saved = [1 - sparse.PAPER_MB["SNELL-8"][model] / gps for model, gps in sparse.PAPER_MB["masked"].items()]
    assert [round(100 * share, 1) for share in saved] == [31.1, 39.9, 39.9]


def test_a_share_of_the_paper_that_is_not_reached_is_said_not_to():
    plain = {"peak": 100, "beside": 100, "between": []}
    rows = {"AdamW": plain, "8-bit GaLore": {"peak": 40, "beside": 17, "between": [41]}}
    found = pretraining.claims({"60M": rows, "7B": {**rows, "AdamW": {**plain, "peak": 200}}})
    assert "82.5% less optimizer state than AdamW: reached by 60M, 7B (60M 83.0%, 7B 83.0%)" in found[0]
    assert "63.3% less in all than AdamW: reached by 7B (60M 60.0%, 7B 80.0%)" in found[1]
    assert found[2].startswith("7B with 8-bit GaLore within a card of 24 GiB: confirmed")
    rows["8-bit GaLore"] = {"peak": 10, "beside": 19, "between": [26e9]}
    found = pretraining.claims({"7B": rows})
    assert "reached by none" in found[0]
    assert found[2].startswith("7B with 8-bit GaLore within a card of 24 GiB: not confirmed")
