"""`peftjax train` as a process, interrupted while it is deaf: it ends in seconds and says what is saved."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from peftjax.train.interrupt import GRACE

PROGRAM = [sys.executable, "-c", "from peftjax.cli.main import main; main()"]
MORE = 3
"""Seconds beside its grace that a process may need on a busy machine."""


@pytest.fixture
def train(model_folder, data_folder, tmp_path):
    """Starts the command on a folder; what stands on standard error comes as it is written."""
    files = ["--data", data_folder / "train.csv", "--eval-data", data_folder / "dev.csv"]
    options = ["--rank", "2", "--batch-size", "8", "--max-length", "16", "--no-probe", "--save-every", "1"]
    command = [*PROGRAM, "train", "--model", model_folder, *files, "--output", tmp_path / "run", *options]
    started = []

    def start(*more):
        process = subprocess.Popen(
            [str(part) for part in (*command, *more)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "JAX_LOG_COMPILES": "1"},
            text=True,
        )
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reader.start()
        started.append(process)
        return process, lines, reader

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def steps(folder):
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def interrupted(process, lines, reader, number):
    """The last line of a process that was sent a signal, and that ends in time."""
    process.send_signal(number)
    assert process.wait(timeout=GRACE[number] + MORE) == 128 + number
    reader.join(timeout=5)
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "saved"),
    [(signal.SIGINT, "no checkpoint in {} yet; the same command starts again"),
     (signal.SIGTERM, "step 1 is saved in {}; the same command continues from there")],
)  # fmt: skip
def test_while_the_step_compiles(train, tmp_path, number, saved):
    process, lines, reader = train("--steps", "4", "--save-every", "4")
    until(lambda: any("Compiling jit(run_step)" in line for line in lines))
    last = interrupted(process, lines, reader, number)
    assert f"interrupted: {saved.format(tmp_path / 'run')}" in last


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_a_checkpoint_is_written_and_the_run_goes_on(train, tmp_path, number):
    folder = tmp_path / "run" / "checkpoints"
    process, lines, reader = train("--steps", "400")
    until(lambda: (folder / "2").exists() and any(folder.glob("*.orbax-checkpoint-tmp")))
    last = interrupted(process, lines, reader, number)
    step = int(re.search(r"interrupted: step (\d+) is saved in", last)[1])
    assert step == max(steps(folder)) >= 2
    assert (folder / str(step) / "checksums.json").exists()
    process, lines, _ = train("--steps", "400")
    until(lambda: max(steps(folder)) > step)
    assert not any("unreadable" in line for line in lines)
