"""The tables of models, methods and machines, from cells that are made up."""

import pytest

import peftjax as pj
from experiments.harness.contenders import Setting
from experiments.harness.memory import measure
from experiments.plan import scaling, topologies
from experiments.plan.cells import METHODS, NO_REMAT, PUBLISHED, TARGETS
from peftjax.planner.compiling import DoesNotFit

GIB = 2**30


def cell(gathered=2.0, fits=True, devices=16, seconds=(1.0, 0.1, 0.5)):
    return {
        "peak": 10 * GIB,
        "bytes": {"code": GIB},
        "between": [],
        "capacity": (16 if fits else 8) * GIB,
        "fits": fits,
        "items": 4096 * devices,
        "devices": devices,
        "roofline": dict(zip(("compute", "memory", "network"), seconds)),
        "collectives": {"all-gather": {"runs": 3, "nbytes": gathered * GIB, "crossing": gathered * GIB / 2}},
        "compile_seconds": 60.0,
        "jax": "0",
    }


REFUSED = {"reason": "it is too large", "fits": False, "needed": 20 * GIB, "capacity": 16 * GIB}
NAME = "Llama-3-8B on v5e-16"


def test_every_cell_is_asked_once():
    table = topologies.make_table()
    names = [model.name for model in table.models]
    assert len(names) == len(set(names))
    asked = [
        (model.name, one.label)
        for model in table.models
        for one in table.contenders
        if table.asked(model, one)
    ]
    assert len(asked) == 2 * len(TARGETS) * len(METHODS) + 1 + len(topologies.OTHERS)
    assert ("Llama-3-8B on v5e-1", "QLoRA") in asked
    assert (PUBLISHED.name, NO_REMAT.label) in asked
    for model in table.models:
        devices = 1 if model.mesh is None else int(model.mesh.partition("=")[2])
        assert model.batch == devices * (2 if model is PUBLISHED else 1)


def test_what_does_not_fit_is_a_row_and_what_is_missing_is_named():
    text = topologies.report({NAME: {"LoRA": cell(), "MEFT": REFUSED, "LST": {"reason": "no such heads"}}})
    assert "| LoRA | 11.00 | 16.00 | yes | 2.00 | 1.0000 | 0.1000 | 0.5000 | 4,096 | 60 |" in text
    assert "| MEFT | 20.00 | 16.00 | no |" in text
    assert "| LST |  |  | does not compile |" in text
    assert "- MEFT: it is too large" in text
    assert f"- {NAME}: QLoRA, GaLore\n" in text
    assert "| 4 | LoRA | not recorded yet |" in text


def test_the_bound_stands_beside_the_published_rate():
    found = {PUBLISHED.name: {NO_REMAT.label: cell(devices=2, seconds=(0.4, 0.1, 0.0))}}
    assert "is 10,240, of which that is 122%" in topologies.report(found)
    assert topologies.answer(found)[PUBLISHED.name] == "at most 10,240 tokens/s (published 12,473)"


@pytest.mark.parametrize(("most", "said"), [(2.1, "flat, at most 1.05"), (2.4, "not flat, at most 1.2")])
def test_weak_scaling_is_flat_or_not(most, said):
    names = {target.devices: model.name for target, model in zip(scaling.SLICES, scaling.CELLS)}
    cells = {names[16]: {"LoRA": cell(2.0)}, names[64]: {"LoRA": cell(most)}, names[4]: {"LoRA": cell(1.0)}}
    assert scaling.verdict(cells).startswith(said)
    assert scaling.verdict({names[16]: {"LoRA": cell(2.0)}}) == "not known yet"


def test_a_refused_step_is_a_result(monkeypatch):
    asked = {}

    def plan(*given, **options):
        asked.update(options)
        raise DoesNotFit("it is too large", 20, 16)

    monkeypatch.setattr(pj, "plan", plan)
    model = next(model for model in topologies.CELLS if model.name == NAME)
    found = measure(model, METHODS[0], Setting(steps=1), "cpu")
    assert found == {"reason": "it is too large", "fits": False, "needed": 20, "capacity": 16}
    assert (asked["target"], asked["mesh"]) == ("v5e:4x4", "fsdp=16")
