"""The comparison on SST-2: which runs it makes, and that it goes on where it stopped."""

import json

import pytest

import peftjax as pj
from experiments.glue_sst2.run import Options, best_runs, compare, pick
from experiments.harness.contenders import Contender
from experiments.harness.finetuning import shira
from peftjax.core.errors import PeftError
from peftjax.models.minilm import minilm_path
from peftjax.train.data.dataset import Split


def test_the_rate_is_chosen_with_seed_0_by_held_out_texts():
    asked = []

    def run(rate, seed):
        asked.append((rate, seed))
        return {"rate": rate, "held_out": rate, "accuracy": -rate}

    runs = best_runs(run, (1e-3, 1e-2), seeds=3)
    assert asked == [(1e-3, 0), (1e-2, 0), (1e-2, 1), (1e-2, 2)]
    assert [found["rate"] for found in runs] == [1e-2] * 3


def test_pick_keeps_texts_and_labels_together():
    split = Split(("a", "b", "c"), (0, 1, 2))
    assert pick(split, [2, 0]) == Split(("c", "a"), (2, 0))


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    try:
        minilm_path()
    except PeftError as error:
        pytest.skip(str(error))
    chosen = (Contender("LoRA", lambda setting: pj.lora(rank=8)), shira(8, "gradient"))
    rows = "\n".join(
        f"a {word} film\t{label}" for word, label in (("good", 1), ("bad", 0)) for _ in range(20)
    )
    (tmp_path / "train.tsv").write_text(f"sentence\tlabel\n{rows}\n")
    options = Options(
        tmp_path / "train.tsv",
        tmp_path / "train.tsv",
        output=tmp_path / "out",
        steps=2,
        batch=4,
        held_out=8,
        seeds=1,
        rates=(1e-3,),
    )
    compare(chosen, options)
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    monkeypatch.setattr("experiments.glue_sst2.run.make_runner", lambda *_: None)  # a call of it fails
    compare(chosen, options)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == before
