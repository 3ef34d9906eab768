"""What a worker does with the folder that it gets: the training in the background, its log, code and end."""

import re
import shlex
import subprocess
import sys
import time

import pytest
import tiny_decoder_folder
from fake_cluster import ROOT
from support import quick_at

JOB = """
NAME=a-run
BUCKET=a-bucket
RUN_DIR={folder}/bucket/runs/a-run
PYTHON_VERSION=3.12
JAX='jax[tpu]'
REQUIREMENT=file:peftjax.tar.gz
COMMAND=(train --data 'my data.jsonl')
ENVIRONMENT=('GREETING=good day')
"""
TRAINING = """#!/usr/bin/env bash
printf '%s\\n' "$GREETING" "$@"
{body}
"""


@pytest.fixture
def worker(cluster):
    """Runs `worker.sh` in a home with a fake installation, whose training does what it is given."""
    launch = cluster.folder / "home" / "peftjax-launch"
    launch.mkdir()
    (launch / "worker.sh").write_text((cluster.scripts / "lib" / "worker.sh").read_text())
    (launch / "job.sh").write_text(JOB.format(folder=shlex.quote(str(cluster.folder))))
    program = cluster.folder / "home" / "peftjax-venv" / "bin" / "peftjax"
    program.parent.mkdir(parents=True)
    for tool in ("mountpoint", "gcsfuse", "sudo"):
        (cluster.folder / "fakes" / "bin" / tool).symlink_to(cluster.folder / "fakes" / "bin" / "uv")

    def run(command, body=None):
        if body is not None:
            program.write_text(TRAINING.format(body=body))
            program.chmod(0o755)
        return subprocess.run(
            ["bash", launch / "worker.sh", command],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    yield run
    run("stop")


def state(worker):
    return worker("state").stdout.split()[0].removeprefix("peftjax-state=")


def await_end(worker, seconds=10):
    for _ in range(10 * seconds):
        if (found := state(worker)) != "running":
            return found
        time.sleep(0.1)
    raise AssertionError("the training does not end")


@pytest.mark.parametrize(("code", "expected"), quick_at([(0, "finished"), (2, "refused"), (7, "failed")], 0))
def test_a_training_runs_in_the_background_to_its_end(worker, cluster, code, expected):
    assert state(worker) == "ready"
    assert worker("start", f"exit {code}").returncode == 0
    assert await_end(worker) == expected
    log = "good day\ntrain\n--data\nmy data.jsonl\n"
    assert worker("follow").stdout == log
    (copy,) = (cluster.folder / "bucket" / "runs" / "a-run" / "logs").iterdir()
    assert copy.read_text() == log


def test_a_training_is_started_once_and_stopped_whole(worker, cluster):
    child = cluster.folder / "child"
    assert worker("start", f"sleep 100 & echo $! >{shlex.quote(str(child))}; wait").returncode == 0
    for _ in range(100):
        if child.exists() and child.read_text():
            break
        time.sleep(0.05)
    assert state(worker) == "running"
    again = worker("start")
    assert again.returncode == 3
    assert "a training is running already" in again.stderr
    worker("stop")
    assert state(worker) == "ready"
    assert subprocess.run(["kill", "-0", child.read_text().strip()], capture_output=True).returncode != 0


@pytest.mark.slow
def test_what_was_killed_is_failed(worker, cluster):
    worker("start", "sleep 100")
    group = (cluster.folder / "home" / "a-run.pid").read_text().strip()
    subprocess.run(["kill", "-KILL", "--", f"-{group}"], check=True)
    assert await_end(worker) == "failed"


@pytest.mark.slow
def test_it_installs_and_mounts_before_it_trains(worker, cluster):
    (cluster.folder / "fakes" / "bin" / "mountpoint").unlink()
    (cluster.folder / "fakes" / "bin" / "mountpoint").symlink_to("/bin/false")
    assert worker("start", "true").returncode == 0
    uv, mount = ([call for call in cluster.calls if call[0] == tool] for tool in ("uv", "gcsfuse"))
    launch = cluster.folder / "home" / "peftjax-launch"
    assert uv[0][-3:-1] == ["--python", "3.12"]
    assert uv[1][-2:] == ["jax[tpu]", f"peftjax[train] @ file://{launch}/peftjax.tar.gz"]
    assert mount == [["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0", "a-bucket", "/bucket"]]


def test_an_installation_that_fails_starts_nothing(worker, cluster):
    (cluster.folder / "fakes" / "bin" / "uv").unlink()
    (cluster.folder / "fakes" / "bin" / "uv").symlink_to("/bin/false")
    assert worker("start", "true").returncode == 1
    assert worker("install-and-train", "true").returncode == 1
    assert state(worker) == "ready"


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on_from_its_checkpoint(worker, cluster):
    home, output = cluster.folder / "home", cluster.folder / "output"
    data = tiny_decoder_folder.write_completions(cluster.folder / "train.jsonl", 60)
    (cluster.folder / "model").mkdir()
    model = tiny_decoder_folder.save_decoder(cluster.folder / "model")
    command = [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--output",
        output,
    ]
    command += ["--steps", "150", "--save-every", "10", "--max-length", "16", "--batch-size", "4"]
    words = " ".join(shlex.quote(str(word)) for word in command)
    with (home / "peftjax-launch" / "job.sh").open("a") as job:
        job.write(f"COMMAND=({words})\nENVIRONMENT=(JAX_PLATFORMS=cpu PYTHONPATH={shlex.quote(str(ROOT))})\n")
    program = home / "peftjax-venv" / "bin" / "peftjax"
    program.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from peftjax.cli.main import main; main()' \"$@\"\n"
    )
    program.chmod(0o755)
    log = home / "a-run.log"

    assert worker("start").returncode == 0
    for _ in range(600):
        if {"10", "20", "30"} & {path.name for path in output.glob("checkpoints/*")}:
            break
        time.sleep(0.1)
    worker("stop")
    (saved,) = re.findall("interrupted: step ([0-9]+) is saved", log.read_text())
    before = len(log.read_text())
    assert worker("start").returncode == 0
    assert await_end(worker, seconds=200) == "finished"
    steps = [int(step) for step in re.findall("step ([0-9]+)/150", log.read_text()[before:])]
    assert int(saved) < steps[0] <= int(saved) + 10
    assert steps[-1] == 150
