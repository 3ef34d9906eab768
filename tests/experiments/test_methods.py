"""The table over the registry: sizes by one rule, cells that are measured once, and what is told of them."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import peftjax as pj
from experiments.digits_transfer.data import Images
from experiments.digits_transfer.pretrain import Pretraining
from experiments.digits_transfer.transfer import Transfer
from experiments.harness.contenders import Setting, adapter_size, make_method
from experiments.harness.training import finetuning_optimizer, make_programs
from experiments.methods import run
from experiments.methods.entries import NEEDS, SIZES, entry_of, nearest, size_option
from experiments.methods.measure import base_loss, loss_before
from experiments.methods.report import HEADER, answer, apart, report
from experiments.methods.tasks import digits_task, sst2_task
from peftjax.core.errors import PeftError

WIDTH = 32
BASE = Pretraining(width=WIDTH, layers=1, steps=3, batch=4, held_out=2)
TRANSFER = Transfer(shots=2, validation=2, test=2, steps=2, batch=4)


def images() -> Images:
    pixels = np.random.default_rng(0).uniform(-1, 1, (80, 1, 8, 8)).astype(np.float32)
    return Images(pixels, np.arange(80, dtype=np.int32) % 10)


@pytest.fixture(scope="module")
def task():
    found = digits_task(2, BASE, TRANSFER, images)
    return dataclasses.replace(found, rates=(1e-3, 1e-2), wider=1)


def entry(task, name):
    model = task.shapes.backbone()
    params = task.shapes.params(model)
    found = entry_of(name, task.rank, task.steps, model, params, task.width)
    return found, adapter_size(make_method(found.contender, Setting(task.steps), model, params), params)


def test_the_nearest_size_is_found_up_and_down_and_between_sizes_that_do_not_fit():
    assert nearest(lambda size: 10 * size, 137, whole=True) == 14
    assert nearest(lambda size: 1000 // size, 90, whole=True) == 11
    assert nearest(lambda size: None if size % 4 else size, 13, whole=True) == 12
    assert nearest(lambda share: round(1000 * share), 55, whole=False) == pytest.approx(0.055, abs=1e-3)
    assert nearest(lambda size: 7, 5, whole=True) is None
    assert nearest(lambda size: None, 5, whole=True) is None


@pytest.mark.parametrize("name", ["houlsby", "mam", "nf4", "adalora"])
def test_a_method_trains_as_much_as_lora_where_an_option_sets_its_size(task, name):
    found, trained = entry(task, name)
    assert trained == pytest.approx(entry(task, "lora")[1], rel=0.15)
    assert all(found.options[option] for option in [size_option(name)] if option)


def test_what_trains_the_rest_too_is_not_made_as_small_as_lora(task):
    assert size_option("switchlora") is size_option("galore") is size_option("full") is None
    assert entry(task, "switchlora")[0].options == {"rank": WIDTH // 4}
    assert entry(task, "galore")[0].options == {"rank": WIDTH // 4, "every": 1}


def test_every_method_has_an_entry_or_a_reason(task):
    model = task.shapes.backbone()
    params = task.shapes.params(model)
    for name in pj.METHODS:
        option = size_option(name)
        assert option is None or option in SIZES
        if name in NEEDS:
            with pytest.raises(PeftError, match="rows"):
                entry_of(name, task.rank, task.steps, model, params, task.width)


def test_a_task_without_its_data_says_which_option_gives_them():
    with pytest.raises(PeftError, match="give --sst2 FOLDER"):
        run.make_task("sst2", run.Options())


def test_a_text_task_reads_nothing_before_it_is_asked(tmp_path):
    assert sst2_task(tmp_path).score == "accuracy"


SETTINGS = {
    "about": "A test.",
    "rank": 4,
    "score": "accuracy",
    "rates": [1e-3],
    "sizes": ["rank"],
    "seeds": 3,
}
PLAN = {"trained": 10, "kept": 4000, "peak": 9000, "flops": 2_000_000}


def scored(*values):
    return {"rate": 1e-3, "score": list(values), "forgetting": [0.5, 0.5, 0.5]}


def results(**rows):
    return {"settings": {**SETTINGS, "target": "cpu"}, "rows": rows}


def test_the_table_says_what_is_not_measured_and_why_a_method_is_not_there():
    rows = {
        "lora": {"options": {"rank": 4}, "plan": PLAN, "score": scored(0.7, 0.8, 0.9)},
        "dora": {"options": {}, "plan": {**PLAN, "kept": 8000}, "disk": {"reason": "it has none"}},
        "rows": {"reason": "no rows"},
    }
    lines = [line.split(" | ") for line in report(results(**rows)).splitlines() if line.startswith("| ")]
    header, lora, dora, named = lines
    assert len(header) == len(lora) == len(dora) == len(named) == len(HEADER)
    assert lora[1:3] == ["rank=4", "10"]
    assert lora[3] == lora[10] == "not measured"
    assert lora[12:] == ["80.0 ± 10.0", "", "+0.500 ± 0.000 |"]
    assert dora[3] == "not here: it has none"
    assert dora[4:6] == ["8", "2.00"]
    assert named[1] == "not here: no rows"


def test_what_is_told_apart_takes_the_seeds_into_account():
    same, better, worse = [0.72, 0.78, 0.91], [0.8, 0.9, 1.0], [0.6, 0.7, 0.8]
    (said,) = apart({"lora": [0.7, 0.8, 0.9], "a": same, "b": better, "c": worse}, accuracy=True)
    assert "more than 4.3 standard errors" in said
    assert "better b; worse c. All others (1) are not told apart from LoRA: a." in said
    (said,) = apart({"lora": [0.7, 0.8, 0.9], "b": better}, accuracy=False)
    assert "better none; worse b" in said
    assert "No score was measured" in apart({}, accuracy=True)[0]


def test_the_answer_is_of_those_that_keep_least_and_score_best():
    rows = {
        "lora": {"options": {}, "plan": PLAN, "score": scored(0.7, 0.8, 0.9)},
        "lst": {"options": {}, "plan": {**PLAN, "kept": 1000}},
    }
    assert answer(results(**rows)) == {
        "lst keeps": "0.25 x LoRA",
        "lora keeps": "1.00 x LoRA",
        "lora": "80.0 ± 10.0 %",
    }


@pytest.mark.slow
def test_cells_are_measured_once_and_written_one_by_one(task, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    options = run.Options(
        methods=("lora", "vqt", "rows", "eva"), seeds=2, rounds=2, target="cpu", missing=True, output=tmp_path
    )
    run.fill(task, tmp_path, dataclasses.replace(options, columns=("plan", "disk")))
    text = run.fill(task, tmp_path, options)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["lora", "eva", "rows", "vqt"]  # the registry's order
    lora, vqt = rows["lora"], rows["vqt"]
    assert lora["plan"]["kept"] > vqt["plan"]["kept"] > 0
    assert lora["disk"]["bytes"] > 4 * lora["plan"]["trained"]
    assert len(lora["score"]["score"]) == len(lora["score"]["forgetting"]) == len(lora["time"]["ratios"]) == 2
    assert all(math.isfinite(loss) for loss in lora["score"]["forgetting"])
    assert vqt["score"]["forgetting"] is None
    assert len(lora["score"]["tried"]) >= 2
    assert "new tokens" in rows["rows"]["reason"]
    assert "| rows | not here: " in text
    assert (tmp_path / "results.png").stat().st_size > 0
    monkeypatch.setattr(run, "measured", None)  # a call of it fails
    assert run.fill(task, tmp_path, options) == text
    with pytest.raises(PeftError, match="results with seeds 2, not 3"):
        run.fill(task, tmp_path, dataclasses.replace(options, seeds=3))


@pytest.mark.slow
def test_what_has_not_moved_has_forgotten_nothing(task):
    model, params = task.open(1)
    method = make_method(entry(task, "lora")[0].contender, Setting(1), model, params)
    programs = make_programs(model, method, finetuning_optimizer(1))
    state = programs.start(method, params, 1.0, 0)
    fresh = loss_before(task, programs, state)
    assert fresh == pytest.approx(
        base_loss(task), rel=1e-5
    )  # under the classifier of pre-training, not the new one
    moved = dataclasses.replace(state, trainable=jax.tree.map(lambda leaf: leaf + 0.3, state.trainable))
    assert loss_before(task, programs, moved) != pytest.approx(fresh, rel=1e-3)
