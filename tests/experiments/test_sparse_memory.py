"""The memory experiment on a tiny vision transformer, compiled for a CPU."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from support import KEY

import peftjax as pj
from experiments.sparse import memory
from experiments.sparse.masked import masked
from experiments.sparse.memory_report import PAPER_MB, claims
from peftjax.models.vit import ViTConfig

TINY = ViTConfig(16, 2, 2, 32, image_size=(8, 8), patch_size=(4, 4))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(memory, "MODELS", {"tiny": TINY})


@pytest.mark.slow
def test_it_writes_what_it_measured_and_keeps_what_it_did_not(tiny, tmp_path):
    options = {"output": tmp_path, "target": "cpu", "batch": 2, "classes": 3}
    memory.main(memory.Options(**options, models=("tiny",), rows=("LoRA-8",)))
    memory.main(memory.Options(**options, models=("tiny",), rows=("full", "masked")))
    results = json.loads((tmp_path / "memory.json").read_text())["tiny"]
    assert list(results) == ["LoRA-8", "full", "masked"]
    weights = results["full"]["bytes"]["trainable"]
    linear = 2 * 4 * (4 * 16 * 16 + 2 * 16 * 32)
    assert results["masked"]["bytes"]["method_state"] == linear // 4  # a byte each
    assert results["masked"]["bytes"]["trainable"] == linear + 4 * (16 * 3 + 3 + 16)
    assert results["full"]["peak"] > 3 * weights > results["LoRA-8"]["bytes"]["weights"]
    assert (tmp_path / "memory.png").stat().st_size > 0
    assert "| masked |" in (tmp_path / "memory.md").read_text()


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


def test_a_claim_that_does_not_hold_is_said_not_to():
    held = {"LoRA-8": plan(100), "SNELL-8": plan(109), "masked": plan(200), "SNELL-32": plan(137)}
    missed = {"LoRA-8": plan(100), "SNELL-8": plan(111), "masked": plan(200), "SNELL-32": plan(137)}
    assert [": confirmed (" in line for line in claims({"ViT-B/16": held})] == [True, True]
    both = claims({"ViT-B/16": held, "ViT-L/16": missed})
    assert [": not confirmed (" in line for line in both] == [True, True]
    assert both[0].endswith("(ViT-B/16 +9.0%, ViT-L/16 +11.0%).")


def test_the_papers_numbers_are_its_claim():
    saved = [1 - PAPER_MB["SNELL-8"][model] / gps for model, gps in PAPER_MB["masked"].items()]
    assert [round(100 * share, 1) for share in saved] == [31.1, 39.9, 39.9]
