"""The search for the largest or the cheapest step, with a compiler that is made up."""

import itertools
from types import SimpleNamespace

import pytest

from peftjax.core.errors import PeftError
from peftjax.planner.compiling import DoesNotFit
from peftjax.planner.search import cheapest, largest, meshes, never, rows_of, time_limit


def compiler(limit, *, refuses=True):
    """Plans of sizes, of which those above the limit are refused, or compile and do not fit."""
    asked = []

    def plan_of(size):
        asked.append(size)
        if size > limit and refuses:
            raise DoesNotFit("too large", size)
        return SimpleNamespace(fits=size <= limit, target="made up", needed=size)

    return plan_of, asked


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize(
    ("limit", "start", "unit"), [*itertools.product((8, 9, 40, 100), (1, 8, 64), (1, 8))]
)
def test_the_largest_multiple_that_fits_is_found_in_few_tries(limit, start, unit, refuses):
    plan_of, asked = compiler(limit, refuses=refuses)
    found = largest(plan_of, start, unit=unit)
    assert found.best.value == limit // unit * unit
    assert found.finished
    assert len(asked) == len(set(asked)) <= 2 * limit.bit_length()
    assert [one.needed for one in found.attempts] == asked
    assert all(size % unit == 0 for size in asked)


def test_nothing_above_the_most_is_tried():
    plan_of, asked = compiler(1000)
    found = largest(plan_of, 512, unit=128, most=700)
    assert (found.best.value, found.finished, max(asked)) == (640, True, 640)
    with pytest.raises(PeftError, match="largest size is 100"):
        largest(plan_of, 1, unit=128, most=100)


def test_where_nothing_fits_there_is_no_best():
    found = largest(compiler(0)[0], 4)
    assert (found.best, found.finished) == (None, True)
    assert [one.outcome for one in found.attempts] == ["does not fit"] * 3


def test_the_time_limit_leaves_what_is_known():
    plan_of, asked = compiler(100)
    found = largest(plan_of, 1, late=lambda: len(asked) == 3)
    assert (found.best.value, found.finished) == (4, False)
    values = {"a": 3, "b": 1, "c": 2}
    tried = cheapest(priced(values), list(values), late=lambda: False)
    assert (tried.best.value, tried.finished) == ("b", True)
    passed = iter([False, True])
    stopped = cheapest(priced(values), list(values), late=lambda: next(passed))
    assert (stopped.best.value, stopped.untried, stopped.finished) == ("a", ("b", "c"), False)


def priced(prices, fits=lambda value: True):
    def plan_of(value):
        if prices[value] is None:
            raise PeftError("it has no such heads")
        bound = SimpleNamespace(seconds=prices[value])
        return SimpleNamespace(fits=fits(value), roofline=bound, target="made up", needed=1)

    return plan_of


def test_the_cheapest_is_one_that_fits_and_compiles():
    prices = {"none": 1, "some": 2, "all": 3, "odd": None}
    found = cheapest(priced(prices, lambda value: value != "none"), list(prices))
    assert found.best.value == "some"
    outcomes = [one.outcome for one in found.attempts]
    assert outcomes == ["does not fit", "fits", "fits", "does not compile"]


def test_what_does_not_compile_is_no_size_that_does_not_fit():
    def plan_of(size):
        raise PeftError("no such target")

    with pytest.raises(PeftError, match="no such target"):
        largest(plan_of, 1)
    with pytest.raises(PeftError, match="memory of 'cpu' is not known"):
        largest(lambda size: SimpleNamespace(fits=None, target="cpu"), 1)


def test_meshes_divide_rows_and_heads():
    assert meshes(8, rows=8, heads=4) == ["fsdp=8,tensor=1", "fsdp=4,tensor=2", "fsdp=2,tensor=4"]
    assert meshes(8, rows=2, heads=32) == ["fsdp=2,tensor=4", "fsdp=1,tensor=8"]
    assert rows_of("fsdp=2,expert=4", 8) == 8
    assert rows_of(None, 8) == rows_of("tensor=8", 8) == 1
    assert rows_of("all", 8) == rows_of("data=2,fsdp=4", 8) == 8


def test_a_limit_of_no_minutes_is_over_at_once():
    assert time_limit(0)()
    assert not time_limit(1)()
    assert not time_limit(None)()
    assert not never()
