"""What comparisons share: the loop, the record of runs, tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from experiments.digits.data import Images, training_batches
from experiments.digits.pretrain import Pretraining, build_model
from experiments.sparse.digits import DENSITY, RANK
from experiments.sparse.entrants import entrants
from experiments.tuning.entrants import Entrant, Setting, adapter_size, method_for, require_equal
from experiments.tuning.record import open_record
from experiments.tuning.report import difference, make_table, write_report
from experiments.tuning.trainer import make_trainer
from peftjax.core.errors import PeftError


def line(label: str, *, matched: bool, accuracy: list[float]) -> dict:
    return {
        "label": label,
        "matched": matched,
        "trained": 1234,
        "rate": 1e-3,
        "accuracy": accuracy,
        "step_seconds": 0.5,
    }


LINES = [
    line("full", matched=False, accuracy=[0.9, 0.8]),
    line("LoRA", matched=True, accuracy=[0.8, 0.6]),
]


@pytest.fixture(scope="module")
def task():
    pixels = np.random.default_rng(0).uniform(-1, 1, (20, 1, 8, 8)).astype(np.float32)
    images = Images(pixels, np.arange(20, dtype=np.int32) % 5)
    model = build_model(Pretraining(width=8, layers=1))
    return model, model.init(jax.random.key(0)), images


@pytest.mark.slow
def test_a_trainer_learns_and_compiles_once_for_all_rates_and_seeds(task):
    model, params, images = task
    trainer = make_trainer(model, pj.full(), steps=30)
    start = pj.full().init(jax.random.key(0), params)
    runs = [
        trainer.fit(start, training_batches(images, 10, seed), rate, seed)
        for rate, seed in ((1e-2, 0), (1e-2, 1), (0.0, 0))
    ]
    trained, other, still = (trainer.evaluate(run, [images.batch()])["loss"] for run in runs)
    assert trained < 0.8 * still
    assert other != trained
    assert runs[0].compiled_seconds > 0
    assert runs[1].compiled_seconds == runs[2].compiled_seconds == 0.0
    assert jnp.array_equal(
        runs[2].trainable["head/classifier/kernel"], params["head"]["classifier"]["kernel"]
    )


def test_a_run_that_diverges_ends_and_says_so(task):
    model, params, images = task
    trainer = make_trainer(model, pj.full(), steps=5)
    start = pj.full().init(jax.random.key(0), params)
    run = trainer.fit(start, training_batches(images, 10, 0), float("inf"), 0)
    assert not np.isfinite(run.loss)


def test_an_entrant_gets_steps_and_gradients_and_the_classifier_is_trained(task):
    model, params, images = task
    asked = []

    def make(setting: Setting) -> pj.Transform:
        asked.append(setting.steps)
        return pj.shira(rank=1, mask="gradient", gradients=setting.gradients())

    method = method_for(Entrant("SHiRA", make), model, params, 7, [images.batch()])
    assert asked == [7]
    assert adapter_size(method, params) == 4 * (8 + 8) + 2 * (8 + 16)
    _, trainable = method.init(jax.random.key(0), params)
    assert set(trainable["train"]) == {"head/classifier/kernel", "head/classifier/bias"}


def test_slots_that_the_optimizer_sets_do_not_count(task):
    model, params, _ = task
    sara = Entrant("SaRA", lambda setting: pj.sara(density=0.25))
    method = method_for(sara, model, params, 1, [])
    assert adapter_size(method, params) == (4 * 8 * 8 + 2 * 8 * 16) // 4


@pytest.mark.slow
def test_the_sparse_methods_train_as_many_parameters_as_lora():
    model = build_model(Pretraining())
    params = jax.jit(model.init)(jax.random.key(0))
    images = Images(np.zeros((5, 1, 8, 8), np.float32), np.arange(5, dtype=np.int32))
    chosen = entrants(RANK, DENSITY)
    methods = [method_for(entrant, model, params, 10, [images.batch()]) for entrant in chosen]
    sizes = [(entrant, adapter_size(method, params)) for entrant, method in zip(chosen, methods)]
    require_equal(sizes, 0.02)
    assert {entrant.label: size for entrant, size in sizes}["LoRA r=4"] == 14336


def test_a_recorded_run_is_not_repeated(tmp_path):
    file = tmp_path / "runs.json"
    record = open_record(file, {"rates": (1, 2)})
    assert record.recall({"seed": 0}, lambda: {"score": 1}) == {"seed": 0, "score": 1}
    again = open_record(file, {"rates": (1, 2)})
    assert again.recall({"seed": 0}, lambda: pytest.fail("run again"))["score"] == 1
    assert again.recall({"seed": 1}, lambda: {"score": 2})["score"] == 2


def test_a_record_of_other_settings_is_refused(tmp_path):
    open_record(tmp_path / "runs.json", {"steps": 3}).recall({"seed": 0}, lambda: {"score": 1})
    with pytest.raises(PeftError, match="steps 3, not 4"):
        open_record(tmp_path / "runs.json", {"steps": 4})


def test_the_table_compares_with_the_first_matched_method():
    full, lora = make_table(LINES).splitlines()[2:]
    assert full == "| full | 1,234 | 0.001 | 85.0 ± 7.1 | +15.0 ± 5.0 | 500.0 |"
    assert lora == "| LoRA | 1,234 | 0.001 | 70.0 ± 14.1 |  | 500.0 |"


def test_differences_are_taken_seed_by_seed():
    assert difference([0.5, 0.9], [0.4, 0.8]) == "+10.0 ± 0.0"
    with pytest.raises(ValueError, match="longer"):
        difference([0.5], [0.4, 0.8])


def test_a_report_is_a_table_a_plot_and_the_numbers(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    table = write_report(tmp_path / "new", "What it is.", {"lines": LINES})
    assert (tmp_path / "new" / "results.md").read_text() == table
    assert table.startswith("What it is.\n\n| method |")
    assert json.loads((tmp_path / "new" / "results.json").read_text())["lines"] == LINES
    assert (tmp_path / "new" / "results.png").read_bytes().startswith(b"\x89PNG")
