"""Several processes as one run: the losses of one process, stopped and resumed by another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import peftjax as pj
from peftjax.parallel.processes import join_processes

PROGRAM = "from peftjax.cli.main import main; main()"
STEPS = 8
OPTIONS = [
    "train", "--save-every", "2", "--log-every", "1", "--max-length", "16", "--batch-size", "8", "--no-probe"
]  # fmt: skip


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def started(folder, count, devices, steps=STEPS):
    """Processes of one run, of so many devices each."""
    steps = ["--steps", str(steps), "--eval-every", str(steps)]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, *OPTIONS, *steps, "--output", str(folder)]
    if count == 1:
        return [subprocess.Popen([*command, "--mesh", "all"], env={**os.environ, **flags})]
    port = free_port()
    return [
        subprocess.Popen(
            [*command, "--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(n)],
            env={**os.environ, **flags},
        )
        for n in range(count)
    ]


def lines(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(folder):
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.slow
def test_two_processes_are_stopped_and_one_goes_on(tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    (alone,) = started(whole, 1, 4)
    assert alone.wait(300) == 0

    pair = started(parted, 2, 2)
    until = time.monotonic() + 300
    while len(losses(parted)) < 3:  # a checkpoint is written
        assert time.monotonic() < until
        assert all(one.poll() is None for one in pair)
        time.sleep(0.05)
    for one in pair:
        one.send_signal(signal.SIGKILL)
        one.wait()
    before = len(losses(parted))
    assert before < STEPS

    (alone,) = started(parted, 1, 4)
    assert alone.wait(300) == 0
    assert len(losses(whole)) == STEPS
    np.testing.assert_allclose(losses(parted), losses(whole), rtol=1e-5)
    found, wanted = (json.loads((folder / "summary.json").read_text()) for folder in (parted, whole))
    assert found["accuracy"] == wanted["accuracy"]


@pytest.mark.slow
def test_the_first_of_two_processes_writes(tmp_path):
    folder = tmp_path / "run"
    assert [one.wait(300) for one in started(folder, 2, 1, steps=2)] == [0, 0]
    assert len(losses(folder)) == 2
    assert (folder / "adapter" / "adapter.safetensors").exists()


def test_half_a_description_is_refused():
    with pytest.raises(pj.PeftError, match="distributed: processes, process is missing"):
        join_processes("localhost:1")
