"""One process at a time works in a run's folder."""

import os
import subprocess
import sys

import pytest

from peftjax.errors import PeftError
from peftjax.io.lock import FILE, at_work

HOLD = """
import pathlib, sys, time
from peftjax.io.lock import at_work
with at_work(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_which_process_is_at_work_and_a_dead_ones_lock_is_taken_over(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(PeftError, match=f"process {other.pid} is at work in"), at_work(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / FILE).read_text() == str(other.pid)
    with at_work(tmp_path):
        assert (tmp_path / FILE).read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_process_are_told_apart(tmp_path):
    with (
        at_work(tmp_path / "run"),
        pytest.raises(PeftError, match=f"process {os.getpid()} is at work"),
        at_work(tmp_path / "run"),
    ):
        pass
    with at_work(tmp_path / "run"), at_work(tmp_path / "other"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file/run", "n" * 300):
        with pytest.raises(PeftError, match="cannot write to the folder"), at_work(tmp_path / name):
            pass
