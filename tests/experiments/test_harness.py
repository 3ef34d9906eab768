"""What experiments share: the loop, the record of runs, timing, tables."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from experiments.digits_transfer.data import Images, training_batches
from experiments.digits_transfer.pretrain import Pretraining, build_model
from experiments.digits_transfer.run import REPORT, Options
from experiments.harness.contenders import (
    Contender,
    Setting,
    adapter_size,
    calibrated,
    make_method,
    require_equal,
)
from experiments.harness.finetuning import contenders
from experiments.harness.record import open_record, provenance, write_json
from experiments.harness.report import Report, accuracy_table, difference, ratio_rows, write_report
from experiments.harness.timing import measure_in_turn, repeated
from experiments.harness.training import finetuning_optimizer, make_programs, train
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
    return model, jax.jit(model.init)(jax.random.key(0)), images


def method_for(contender, task, steps, batches=()):
    model, params, _ = task
    return make_method(contender, calibrated(steps, model, params, lambda: batches), model, params)


@pytest.mark.slow
def test_a_training_learns_and_compiles_once_for_all_rates_and_seeds(task):
    model, params, images = task
    method = pj.full()
    programs = make_programs(model, method, finetuning_optimizer(30))
    runs = [
        train(programs, programs.start(method, params, rate, seed), training_batches(images, 10, seed), 30)
        for rate, seed in ((1e-2, 0), (1e-2, 1), (0.0, 0))
    ]
    trained, other, still = (programs.evaluate(run.state, [images.batch()])["loss"] for run in runs)
    assert trained < 0.8 * still
    assert other != trained
    assert runs[0].compile_seconds > 0
    assert runs[1].compile_seconds == runs[2].compile_seconds == 0.0
    kernel = params["head"]["classifier"]["kernel"]
    assert jnp.array_equal(runs[2].state.trainable["head/classifier/kernel"], kernel)


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_says_so(task):
    model, params, images = task
    method = pj.full()
    programs = make_programs(model, method, finetuning_optimizer(5))
    start, visited = programs.start(method, params, float("inf"), 0), []
    batches = training_batches(images, 10, 0)
    run = train(programs, start, batches, 5, every=3, visit=lambda state: visited.append(state.step))
    assert run.diverged
    assert visited == [0, run.state.step]
    assert run.state.step < 5


@pytest.mark.slow
def test_a_projection_is_refreshed_when_it_is_due(task):
    model, params, images = task
    method = pj.galore(rank=2, every=2)
    programs = make_programs(model, method, finetuning_optimizer(4))
    batch = images.batch(slice(10))
    state = programs.start(method, params, 1e-2, 0)
    fresh = programs.advance(jax.tree.map(jnp.copy, state), batch)
    same = lambda a, b: all(map(jnp.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    held = lambda state: (state.frozen, state.trainable)
    assert not same(held(fresh), held(state))
    after, _ = programs.step(fresh, batch)
    assert same(held(programs.advance(jax.tree.map(jnp.copy, after), batch)), held(after))


@pytest.mark.slow
def test_a_contender_gets_steps_and_gradients_and_the_classifier_is_trained(task):
    _, params, images = task
    asked = []

    def make(setting: Setting) -> pj.Transform:
        asked.append(setting.steps)
        return pj.shira(rank=1, mask="gradient", gradients=setting.gradients())

    method = method_for(Contender("SHiRA", make), task, 7, [images.batch()])
    assert asked == [7]
    assert adapter_size(method, params) == 4 * (8 + 8) + 2 * (8 + 16)
    _, trainable = method.init(jax.random.key(0), params)
    assert set(trainable["unfreeze"]) == {"head/classifier/kernel", "head/classifier/bias"}


def test_where_nothing_is_trained_no_contender_calibrates():
    with pytest.raises(PeftError, match="trains nothing"):
        Setting(steps=1).gradients()


def test_slots_that_the_optimizer_sets_do_not_count(task):
    _, params, _ = task
    method = method_for(Contender("SaRA", lambda setting: pj.sara(density=0.25)), task, 1)
    assert adapter_size(method, params) == (4 * 8 * 8 + 2 * 8 * 16) // 4


@pytest.mark.slow
def test_the_sparse_methods_train_as_many_parameters_as_lora():
    model = build_model(Pretraining())
    params = jax.jit(model.init)(jax.random.key(0))
    images = Images(np.zeros((5, 1, 8, 8), np.float32), np.arange(5, dtype=np.int32))
    chosen = contenders("sparse", Options().sizes)
    methods = [method_for(one, (model, params, images), 10, [images.batch()]) for one in chosen]
    sizes = [(one, adapter_size(method, params)) for one, method in zip(chosen, methods)]
    require_equal(sizes, 0.02)
    assert {one.label: size for one, size in sizes}["LoRA r=4"] == 14336


def test_a_recorded_run_is_not_repeated(tmp_path):
    record = open_record(tmp_path, {"rates": (1, 2)})
    assert record.recall({"seed": 0}, lambda: {"score": 1}) == {"seed": 0, "score": 1}
    again = open_record(tmp_path, {"rates": (1, 2)})
    assert again.recall({"seed": 0}, lambda: pytest.fail("run again"))["score"] == 1
    assert again.recall({"seed": 1}, lambda: {"score": 2})["score"] == 2


def test_a_record_of_other_settings_is_refused(tmp_path):
    open_record(tmp_path, {"steps": 3}).recall({"seed": 0}, lambda: {"score": 1})
    with pytest.raises(PeftError, match="steps 3, not 4"):
        open_record(tmp_path, {"steps": 4})


def test_the_table_compares_with_the_first_matched_method():
    full, lora = accuracy_table(LINES).splitlines()[2:]
    assert full == "| full | 1,234 | 0.001 | 85.0 ± 7.1 | +15.0 ± 5.0 | 500.0 |"
    assert lora == "| LoRA | 1,234 | 0.001 | 70.0 ± 14.1 |  | 500.0 |"


def test_differences_are_taken_seed_by_seed():
    assert difference([0.5, 0.9], [0.4, 0.8]) == "+10.0 ± 0.0"
    with pytest.raises(ValueError, match="longer"):
        difference([0.5], [0.4, 0.8])


def test_a_row_of_the_results_is_a_line(tmp_path):
    results = {"settings": {"rates": [1, 2]}, "lines": LINES, "none": []}
    write_json(tmp_path / "results.json", results)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == results
    assert [line.count("label") for line in text.splitlines() if "label" in line] == [1, 1]


def test_results_say_what_they_were_made_with(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "run", "--data", str(tmp_path / "texts")])
    made = provenance("jax")
    assert made["command"] == "python -m run --data texts"
    assert made["versions"] == {"jax": jax.__version__}


def test_calls_are_timed_in_turn_after_the_first_of_each():
    done = []

    def call(label):
        return lambda: done.append(label) or jnp.zeros(())

    seconds = measure_in_turn({"a": call("a"), "b": call("b")}, rounds=2)
    assert done == ["a", "b", "a", "b", "a", "b"]
    assert [len(taken) for taken in seconds.values()] == [2, 2]
    assert ratio_rows({"a": [1, 2, 0.5], "b": [2, 2, 2]}, "a")[1] == ("b", 2000, "2.00 [1.00, 4.00]")
    counting = repeated(lambda count: count + 1, jnp.zeros((), int))
    assert [int(counting()) for _ in range(3)] == [1, 2, 3]


def test_a_report_is_a_text_a_plot_and_the_numbers(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    report = Report(lambda results: accuracy_table(results["lines"]), REPORT.draw, REPORT.answer)
    text = write_report(tmp_path / "new", report, {"lines": LINES})
    assert (tmp_path / "new" / "results.md").read_text() == text
    assert text.startswith("| method |")
    assert json.loads((tmp_path / "new" / "results.json").read_text())["lines"] == LINES
    assert (tmp_path / "new" / "results.png").read_bytes().startswith(b"\x89PNG")
