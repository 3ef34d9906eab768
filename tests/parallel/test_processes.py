"""Several processes as one run: the losses of one process, whatever ended them and however many went on."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_decoder_folder

import peftjax as pj
from peftjax.core.errors import LostProcess
from peftjax.parallel.lost import names_lost
from peftjax.parallel.processes import join_processes

PROGRAM = "from peftjax.cli.main import main; main()"
STEPS, DEVICES, LOST_AFTER = 24, 4, 10
OPTIONS = f"--steps {STEPS} --save-every 2 --log-every 1 --eval-every 8 --learning-rate 1e-2 --rank 2".split()
OPTIONS += ["--max-length", "16", "--batch-size", "8", "--eval-batch-size", "8"]


def free_port(ports=(0,)):
    """The first of the ports that is free; 0 is any."""
    for port in ports:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("localhost", port))
            return one.getsockname()[1]
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The options that name a model and its data."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    model = tiny_decoder_folder.save_decoder(folder / "model")
    data = tiny_decoder_folder.write_completions(folder / "train.jsonl", 150)
    return ["--model", str(model), "--data", str(data)]


@pytest.fixture
def start(files, tmp_path):
    """Starts the processes of a run, of four devices together; what they say is in files."""
    started = []

    def run(folder, count, environments=None):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // count}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROGRAM, "train", *files, *OPTIONS, "--output", str(folder)]
        port = free_port()
        found = []
        for number in range(count):
            how = ["--coordinator", f"localhost:{port}", "--processes", str(count), "--process", str(number)]
            if environments is not None:
                environment, how = {**environment, **environments[number]}, ["--distributed"]
            how = ["--mesh", "all"] if count == 1 else [*how, "--lost-after", str(LOST_AFTER)]
            said = (tmp_path / f"said-{len(started)}.txt").open("w+")
            one = subprocess.Popen([*command, *how], env=environment, stdout=said, stderr=said)
            one.said = lambda said=said: os.pread(said.fileno(), 10**6, 0).decode()
            started.append(one)
            found.append(one)
        return found

    yield run
    for one in started:
        one.kill()
        one.wait()


def of_slurm(count):
    """What SLURM tells each of so many tasks."""
    ports = range(65536 - 4096, 65536)  # JAX takes one of them by the job's id
    job = free_port(random.sample(ports, 100)) - ports[0]
    common = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return [{**common, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(count)]


def lines(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(folder):
    return [line["loss"] for line in lines(folder) if "loss" in line]


def await_step(folder, step, processes):
    """Wait until so many steps of the run are done."""
    until = time.monotonic() + 240
    while len(losses(folder)) < step:
        assert time.monotonic() < until
        assert all(one.poll() is None for one in processes), [one.said() for one in processes]
        time.sleep(0.01)


def ended(processes, seconds=240):
    """The codes of processes that end in time."""
    until = time.monotonic() + seconds
    return [one.wait(max(until - time.monotonic(), 0)) for one in processes]


@pytest.mark.slow
def test_a_run_that_is_ended_in_every_way_has_the_losses_of_one_that_is_not(start, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    (alone,) = start(whole, 1)
    assert ended([alone]) == [0], alone.said()

    # All are killed.
    four = start(parted, 4)
    await_step(parted, 3, four)
    for one in four:
        one.kill()
    ended(four)

    # One of a SLURM job is told that its machine goes: all save the same step and end.
    pair = start(parted, 2, of_slurm(2))
    await_step(parted, 8, pair)
    pair[1].send_signal(signal.SIGTERM)
    assert ended(pair) == [128 + signal.SIGTERM] * 2, [one.said() for one in pair]
    last = re.compile(r"interrupted: step (\d+) is saved in .*; the same command continues from there")
    assert {int(last.search(one.said())[1]) for one in pair} == {len(losses(parted))}
    assert ["parameters are trained" in one.said() for one in pair] == [True, False]

    # One is killed: the others end by themselves.
    four = start(parted, 4)
    await_step(parted, 16, four)
    four[2].kill()
    codes = ended(four, LOST_AFTER + 10)
    assert codes.pop(2) == -signal.SIGKILL
    assert set(codes) <= {1, -signal.SIGABRT}
    for said in (one.said() for one in four):
        assert re.search("another (one|process) of the run is lost.* continues from", said), said
    assert len(losses(parted)) < STEPS

    (alone,) = start(parted, 1)
    assert ended([alone]) == [0], alone.said()
    assert (parted / "adapter" / "adapter.safetensors").exists()
    assert len(losses(whole)) == STEPS
    # Other counts of processes sum in other orders; a step left out or made twice is a loss of another batch.
    np.testing.assert_allclose(losses(parted), losses(whole), rtol=1e-3)
    found, wanted = ([line for line in lines(folder) if "eval_loss" in line] for folder in (parted, whole))
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == [8, 16, 24]
    np.testing.assert_allclose(*([line["eval_loss"] for line in part] for part in (found, wanted)), rtol=1e-3)


# Process 1 does nothing any more, as if its machine were gone without closing a connection.
FROZEN = """
import os, signal, sys, time
from peftjax.parallel.lost import last_words
from peftjax.parallel.processes import join_processes
join_processes(sys.argv[1], 2, int(sys.argv[2]), lost_after=4)
with last_words("the other one is lost"):
    if sys.argv[2] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_without_a_sign_of_life_ends_the_others():
    command = [sys.executable, "-c", FROZEN, f"localhost:{free_port()}"]
    first, second = (subprocess.Popen([*command, n], stderr=subprocess.PIPE, text=True) for n in "01")
    try:
        said = first.communicate(timeout=60)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == -signal.SIGABRT
    assert said.endswith("the other one is lost\n")


def test_half_a_description_is_refused():
    with pytest.raises(pj.PeftError, match="distributed: processes, process is missing"):
        join_processes("localhost:1")
    with pytest.raises(pj.PeftError, match="lost_after must be 1 or more, got 0"):
        join_processes(lost_after=0)


@pytest.mark.parametrize(
    ("count", "reason", "raised"),
    [(2, "UNKNOWN: Gloo AllGather failed: Connection reset by peer", LostProcess),
     (2, "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", jax.errors.JaxRuntimeError),
     (1, "UNAVAILABLE: Socket closed", jax.errors.JaxRuntimeError)],
)  # fmt: skip
def test_only_an_error_by_another_process_says_that_it_is_lost(monkeypatch, count, reason, raised):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    with pytest.raises(raised, match=reason), names_lost():
        raise jax.errors.JaxRuntimeError(reason)
