"""What is said of the recorded results is what they are."""

import inspect
import re

import pytest
from support import quick_at

from experiments.harness.report import read_results
from experiments.index import HERE, expected, questions, recorded, write_index

RECORDED = {f"{one.question} {one.folder.name}": one for one in recorded()}


@pytest.mark.parametrize("name", RECORDED)
def test_a_table_is_made_from_the_compact_results_as_it_was(name):
    folder, report = RECORDED[name].folder, RECORDED[name].report
    assert (folder / "results.md").read_text() == report.text(read_results(folder))
    assert (folder / "results.png").exists()
    assert len((folder / "results.json").read_text().splitlines()) < 200


@pytest.mark.parametrize("name", questions())
def test_the_head_of_a_run_has_the_command_and_the_expected_table(name):
    lines = [line.strip() for line in inspect.cleandoc(questions()[name].__doc__).splitlines()]
    assert any(f"python -m experiments.{name}.run" in line for line in lines)
    told = [line for line in lines if line.startswith("|")]
    assert told == expected(name), f"the table in the head of experiments/{name}/run.py is an older one"


def test_the_index_is_written_from_the_results():
    written = (HERE / "README.md").read_text()
    assert written == write_index(), "run python -m experiments.index"
    for path in re.findall(r"\]\(([^)]*)\)", written):
        assert (HERE / path).exists(), path


@pytest.mark.parametrize("name", quick_at(RECORDED, every=8))
def test_every_plot_is_drawn_from_the_compact_results(name, tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    RECORDED[name].report.draw(read_results(RECORDED[name].folder), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
