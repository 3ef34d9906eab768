"""A gigabyte of bfloat16 loads into codes without ever being there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = [sys.executable, "-m", "experiments.quantized.load_memory", "--methods"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak of a part")
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_the_peak_is_below_what_is_held_and_the_largest_tensor(method):
    run = subprocess.run([*LOAD, method], capture_output=True, text=True, check=True)
    name, measured = run.stdout.strip().split(" ", 1)
    measured = json.loads(measured.replace("'", '"'))
    assert name == method
    assert measured["held"] < measured["peak"] < measured["bound"], measured
