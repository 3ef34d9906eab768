"""A signal ends a run within seconds, whatever the main thread does, and what is saved is named."""

import signal
import subprocess
import sys
import time

import jax
import pytest

from peftjax.train.interrupt import Interrupted, ends_within, stop_requests, what_is_saved

# A mutex that is locked twice: a call outside Python's code during which none of its handlers runs, and that
# leaves other threads going, as the compiler does.
DEAF = """
import ctypes
from peftjax.train.interrupt import ends_within
with ends_within(lambda: print("step 4 is saved", flush=True), grace={2: 0.5, 15: 0.5}):
    print("begun", flush=True)
    mutex = (ctypes.c_char * 64)()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_does_not_hear_its_signal_is_ended(number):
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert 0.3 < time.monotonic() - started < 5
    assert (output, process.returncode) == ("step 4 is saved\n", 128 + number)


def test_a_signal_that_is_heard_raises_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Interrupted) as ended, ends_within(lambda: None):
            signal.raise_signal(number)
        assert ended.value.number == number
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_a_run_sigterm_is_told_between_steps_and_ends_it_the_second_time():
    before = signal.getsignal(signal.SIGTERM)
    with ends_within(lambda: None), stop_requests(lambda step: True) as stops:
        assert not stops(1)
        signal.raise_signal(signal.SIGTERM)
        assert stops(2)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_several_processes_stop_where_they_have_agreed(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with stop_requests(lambda step: step == 7) as stops:
        assert [step for step in range(10) if stops(step)] == [7]


def test_what_is_saved_counts_finished_checkpoints_only(tmp_path):
    assert "no checkpoint in" in what_is_saved(tmp_path)
    for name in ("4", "10", "12.orbax-checkpoint-tmp", "14"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("4", "10"):
        (tmp_path / "checkpoints" / name / "_CHECKPOINT_METADATA").write_text("{}")
    assert "step 10 is saved in" in what_is_saved(tmp_path)


# The clean-up that is left out ends the process with SIGABRT here; in earnest it crashed under a step.
CRASHES_AT_EXIT = """
import atexit, os, signal, sys
from peftjax.cli import commands, main
atexit.register(os.abort)
commands.RUN[commands.Methods] = lambda command, console: signal.raise_signal(signal.SIGTERM)
sys.argv = ["peftjax", "methods"]
main.main()
"""


@pytest.mark.slow
def test_an_interrupted_process_does_not_clean_up():
    ended = subprocess.run([sys.executable, "-c", CRASHES_AT_EXIT], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "peftjax: interrupted\n")
