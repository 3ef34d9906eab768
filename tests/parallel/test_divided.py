"""Work that processes divide: the same for any number of them. Here each is a thread with a number."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from peftjax.core.errors import PeftError
from peftjax.parallel import divided as module
from peftjax.parallel.divided import divided

ITEMS = [3, 0, 7, 1, 5]


@pytest.fixture
def processes(monkeypatch):
    """Runs a function in so many threads, each a process to what is tested; gives what they return."""
    here = threading.local()
    monkeypatch.setattr(module, "AT_ONCE", 8)  # several rounds

    def run(count, function):
        meeting, given = threading.Barrier(count, timeout=10), [None] * count

        def allgather(array):
            given[here.number] = np.asarray(array)
            meeting.wait()
            found = np.stack(given)
            meeting.wait()
            return found

        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: here.number)
        monkeypatch.setattr(multihost_utils, "process_allgather", allgather)

        def in_thread(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(in_thread, range(count)))

    return run


def counted_up(items):
    """Item n as n numbers."""
    return [np.arange(100 * n, 101 * n, dtype=np.int32) for n in items]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_all_have_the_result_of_all_in_the_order_of_the_items(processes, count):
    seen = [[] for _ in range(count)]

    def work(number):
        return divided(ITEMS, lambda part: seen[number].extend(part) or counted_up(part))

    for found in processes(count, work):
        np.testing.assert_equal(found, counted_up(ITEMS))
        assert all(array.dtype == np.int32 for array in found)
    assert [n for part in seen for n in part] == ITEMS
    assert max(map(len, seen)) == -(-len(ITEMS) // count)


def test_what_one_cannot_do_all_refuse_with_the_first_sentence(processes):
    def work(part):
        for item in part:
            if item in (0, 5):
                raise PeftError(f"item {item} → no")
        return counted_up(part)

    def refused(number):
        with pytest.raises(PeftError) as error:
            divided(ITEMS, work)
        return str(error.value)

    assert processes(3, refused) == ["item 0 → no"] * 3


def test_nothing_to_do(processes):
    assert processes(2, lambda number: divided([], counted_up)) == [[], []]
