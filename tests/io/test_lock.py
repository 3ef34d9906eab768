"""One process at a time works in a run's folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from peftjax.core.errors import PeftError
from peftjax.io.lock import FILE, at_work

HOLD = """
import pathlib, sys, time
from peftjax.io.lock import at_work
with at_work(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
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


def no_locks(descriptor, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_of_the_file_system_a_process_that_runs_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        at_work(tmp_path),
        pytest.raises(PeftError, match=f"process {os.getpid()} is at work"),
        at_work(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["{dead} 5 {host}", "{own} 5 {host}", "{own}", "", "x y z", "9" * 999, "\0"])
def test_without_locks_what_a_dead_process_left_does_not_count(left, tmp_path, monkeypatch):
    """Not even where its id is another process's by now: the times at which they started differ."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    (tmp_path / FILE).write_text(left.format(dead=ended.pid, own=os.getpid(), host=host))
    with at_work(tmp_path):
        assert (tmp_path / FILE).read_text().split()[::2] == [str(os.getpid()), host]


def test_without_locks_another_machines_process_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / FILE).write_text("7 123456 elsewhere")
    with at_work(tmp_path):
        assert "process 7 on elsewhere was at work there" in caplog.text


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink(path, path)], ids=["folder", "loop"])
def test_a_lock_that_is_no_file_is_one_sentence(make, tmp_path):
    make(tmp_path / FILE)
    with pytest.raises(PeftError, match="cannot write to the folder"), at_work(tmp_path):
        pass
