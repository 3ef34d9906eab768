"""The pre-training comparison on a tiny text and a tiny model."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness.contenders import Setting, adamw
from experiments.harness.per_matrix import per_matrix
from experiments.harness.pretraining import CONTENDERS, Schedule, scaled_matrices
from experiments.pretrain_bytes import run
from experiments.pretrain_bytes.data import first_batches, make_batch, read_text, rows_of, training_batches
from experiments.pretrain_bytes.report import read_lines
from experiments.refresh_cost import run as refresh
from experiments.refresh_cost.bases import BASES, Basis, compressed_side
from experiments.refresh_cost.report import STEP
from peftjax.core.errors import PeftError
from peftjax.optim.bases import captured_energy

TINY = {"width": 32, "layers": 2, "length": 16, "batch": 2, "steps": 4, "rank": 4, "every": 2, "seeds": 2}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.txt").write_bytes(b"x" * 400)
    (tmp_path / "text" / "a.txt").write_bytes(bytes(range(256)) * 50)
    return tmp_path / "text"


def options(folder, **changes):
    sizes = {**TINY, "watch": 2, "watched": 1, "tested": 2, "rates": (1e-3, 1e-2), **changes}
    return run.Options(folder, folder.parent / "out", **sizes)


def narrow(folder, **changes):
    return options(folder, wider=0, **changes)


def test_the_text_is_split_in_the_order_of_the_files_names(folder):
    text = read_text(folder)
    assert [len(part) for part in (text.train, text.held_out, text.test)] == [11880, 660, 660]
    assert text.train[:3].tolist() == [0, 1, 2]
    assert set(text.test[-400:].tolist()) == {ord("x")}
    with pytest.raises(PeftError, match=r"has no \.txt file"):
        read_text(folder.parent)


def test_a_batch_asks_for_the_byte_that_follows():
    rows = rows_of(np.arange(20, dtype=np.uint8), 6)
    assert rows[:, 0].tolist() == [0, 6, 12]
    batch = make_batch(rows)
    assert batch["labels"][1].tolist() == [7, 8, 9, 10, 11, 12]
    assert batch["input_ids"][1].tolist() == [6, 7, 8, 9, 10, 11]


def test_an_epoch_has_every_row_once_and_a_seed_has_its_own_order():
    text = np.arange(49, dtype=np.uint8)
    batches = training_batches(text, 8, 2, seed=0)
    epoch = [next(batches)["input_ids"][:, 0].tolist() for _ in range(3)]
    assert sorted(np.concatenate(epoch).tolist()) == [0, 8, 16, 24, 32, 40]
    other = training_batches(text, 8, 2, seed=1)
    assert epoch != [next(other)["input_ids"][:, 0].tolist() for _ in range(3)]
    spread = first_batches(text, 8, 2, 1)
    assert spread[0]["input_ids"][:, 0].tolist() == [0, 40]


def test_the_learning_rate_rises_and_ends_at_a_tenth():
    rates = [float(Schedule().rates(2.0, 100)(step)) for step in (0, 5, 10, 99, 100)]
    assert 0 < rates[0] < rates[1] < rates[2] == 2.0
    assert rates[4] == pytest.approx(0.2)
    assert rates[3] == pytest.approx(0.2, rel=0.01)


@pytest.mark.slow
def test_optax_galore_sees_every_matrix_of_a_stack_by_itself():
    key = jax.random.key(0)
    grads = {
        "blocks/up/kernel": jax.random.normal(key, (2, 6, 8)),
        "embed/embedding": jax.random.normal(key, (5, 6)),
    }
    tx = per_matrix(1.0, rank=2, every=1, scale=0.5)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    own = optax.contrib.galore(1.0, rank=2, update_proj_gap=1, scale=0.5)
    for layer in range(2):
        alone = {"w": grads["blocks/up/kernel"][layer]}
        expected, _ = own.update(alone, own.init(alone), alone)
        assert jnp.allclose(updates["blocks/up/kernel"][layer], expected["w"], atol=1e-6)
        assert jnp.linalg.matrix_rank(updates["blocks/up/kernel"][layer], rtol=1e-4) == 2
    adam = optax.adam(1.0)
    plain, _ = adam.update(grads, adam.init(grads), grads)
    assert jnp.allclose(updates["embed/embedding"], plain["embed/embedding"], atol=1e-6)


def test_the_control_scales_the_steps_of_the_matrices_alone():
    grads = {"blocks/up/kernel": jnp.ones((2, 3, 4)), "blocks/norm/scale": jnp.ones((2, 3))}
    setting = Setting(steps=1, rank=2, every=1, scale=0.25)
    own, plain = scaled_matrices(setting, 0.1), adamw(setting, 0.1)
    updates, _ = own.update(grads, own.init(grads), grads)
    expected, _ = plain.update(grads, plain.init(grads), grads)
    assert jnp.allclose(updates["blocks/up/kernel"], 0.25 * expected["blocks/up/kernel"])
    assert jnp.allclose(updates["blocks/norm/scale"], expected["blocks/norm/scale"])


@pytest.mark.slow
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.label)
def test_every_contender_trains(contender, folder):
    text = read_text(folder)
    found = run.make_runner(contender, text, options(folder, steps=6))(1e-2, 0)
    assert found["curve"][-1][1] < found["curve"][0][1]
    assert found["beside_weights"] > 0


def test_the_rate_is_looked_for_beyond_the_ends_of_the_grid():
    asked = []

    def fake(rate, seed):
        asked.append(rate)
        loss = abs(math.log10(rate) + 4)  # best at 1e-4
        return {"held_out": None if rate > 5e-2 else loss}

    assert run.best_rate(fake, (1e-3, 1e-2, 1e-1), wider=2) == 1e-4
    assert asked == [1e-3, 1e-2, 1e-1, 1e-4, 1e-5]


@pytest.mark.slow
def test_finished_runs_are_not_run_again(folder, monkeypatch):
    chosen = [contender for contender in CONTENDERS if contender.label in ("AdamW", "LoRA")]
    run.main(narrow(folder, only=("AdamW",)), chosen)
    run.main(narrow(folder), chosen)
    out = folder.parent / "out"
    found = json.loads((out / "runs.json").read_text())["runs"]
    assert [entry["label"] for entry in found] == ["AdamW"] * 3 + ["LoRA"] * 3
    assert found[0]["curve"][0][1] == pytest.approx(math.log(256), rel=0.05)
    assert found[0]["curve"][-1][1] < found[0]["curve"][0][1]
    assert found[0]["beside_weights"] > found[3]["beside_weights"]
    monkeypatch.setattr(run, "train", None)  # a call of it fails
    run.main(narrow(folder), chosen)
    assert "| LoRA |" in (out / "results.md").read_text()
    assert (out / "results.png").stat().st_size > 0
    with pytest.raises(PeftError, match="runs with steps 4, not 5"):
        run.main(narrow(folder, steps=5), chosen)


def test_a_method_with_a_missing_or_diverged_seed_has_no_line():
    def entry(label, seed, rate, loss):
        return {
            "label": label,
            "seed": seed,
            "rate": rate,
            "held_out": loss,
            "test": loss,
            "beside_weights": 1,
            "curve": [(0, 5.0), (2, loss)],
        }

    runs = [entry("a", 0, 1.0, 2.0), entry("a", 0, 3.0, None), entry("a", 1, 1.0, 2.5)]
    runs += [entry("b", 0, 1.0, 2.0), entry("c", 0, 1.0, 2.0), entry("c", 1, 1.0, None)]
    (line,) = read_lines(runs, ["a", "b", "c"], seeds=2)
    assert (line["label"], line["rate"], line["test"]) == ("a", 1.0, [2.0, 2.5])
    assert line["tried"] == {"1": 2.0, "3": None}
    assert line["curve"] == {"steps": [0, 2], "mean": [5.0, 2.25], "low": [5.0, 2.0], "high": [5.0, 2.5]}


@pytest.mark.slow
def test_every_basis_is_of_the_smaller_side():
    key = jax.random.key(0)
    for shape in ((2, 24, 16), (2, 16, 24), (16, 16)):
        g = jax.random.normal(key, shape)
        side = compressed_side(g)
        best = captured_energy(g, BASES[0].find(g, 4, side, key), side)
        for basis in BASES[1:]:
            share = captured_energy(g, basis.find(g, 4, side, key), side)
            assert (share <= best + 1e-5).all()
            assert (share > (0.3, 0.85, 0.95)[basis.iterations] * best).all() or basis.method == "gram"
            assert basis.method != "gram" or jnp.allclose(share, best, atol=1e-5)
        warm = Basis("", "subspace", 0).find(g, 4, side, key, BASES[0].find(g, 4, side, key))
        assert jnp.allclose(captured_energy(g, warm, side), best, atol=1e-3)


@pytest.mark.slow
def test_refreshes_are_timed_and_compared(folder, monkeypatch):
    training = options(folder, width=64, layers=1, rank=8)
    chosen = refresh.Options(training, folder.parent / "refresh", rate=1e-2, shapes=((16, 24),), rounds=1)
    bases = (BASES[0], BASES[3])  # the others differ in their numbers alone
    monkeypatch.setattr(refresh, "BASES", bases)
    refresh.main(chosen)
    found = json.loads((folder.parent / "refresh" / "results.json").read_text())
    assert set(found["refreshes"]) == {STEP, *(basis.label for basis in bases)}
    energy = found["energy"]
    assert energy["SVD"]["steps"] == [0, 2, 4]
    assert energy["subspace, 1, start before"]["steps"] == [2, 4]
    for label, entry in energy.items():
        bound = energy["SVD"]["same"][-len(entry["same"]) :]
        assert all(own <= best + 1e-5 for own, best in zip(entry["same"], bound)), label
    assert all(len(losses) == 2 for losses in found["losses"].values())
    assert (folder.parent / "refresh" / "results.png").stat().st_size > 0
    monkeypatch.setattr(run, "train", None)  # a call of it fails
    refresh.main(chosen)
    assert "| subspace, 1 |" in (folder.parent / "refresh" / "results.md").read_text()
