"""Formats compared on a tiny text and a tiny model."""

import json

import pytest

from experiments.quantized_loss import run

TINY = {"width": 32, "layers": 1, "length": 16, "batch": 2, "steps": 4, "adapter_steps": 3, "rank": 2}


@pytest.mark.slow
def test_formats_are_rounded_adapted_and_merged(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(bytes(range(256)) * 40)
    options = run.Options(
        tmp_path / "text",
        tmp_path / "out",
        **TINY,
        rates=(1e-2, 3e-2),
        tested=2,
        only=("float32", "int4", "int2"),
    )
    run.main(options)
    lines = json.loads((tmp_path / "out" / "results.json").read_text())["lines"]
    floats, int4, int2 = lines
    assert [line["format"] for line in lines] == ["float32", "int4", "int2"]
    assert (floats["bits"], floats["error"]) == (32.0, 0.0)
    assert int2["bits"] < int4["bits"] < 8
    assert 0 < int4["error"] < int2["error"] < 1
    for line in lines:
        assert line["merged"] == pytest.approx(line["adapted"], rel=1e-4)
    assert floats["merged_into_codes"] == pytest.approx(floats["merged"], rel=1e-6)
    assert int2["merged_into_codes"] != int2["merged"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    monkeypatch.setattr(run, "make_runner", None)  # a call of it fails
    run.main(options)
