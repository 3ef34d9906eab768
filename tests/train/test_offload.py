"""The share of the tokens to offload: its closed form and how it moves."""

import pytest

from peftjax.train.offload import offload_fraction

GIVEN = {"bandwidth": 10.0, "layer_seconds": 2.0, "host_bytes": 60.0, "layers": 6}


def fraction(kept=4.0, other=20.0, **changes):
    return offload_fraction(kept, other, **{**GIVEN, **changes})


def test_the_closed_form():
    assert fraction() == pytest.approx((60 / 4 - 4) / 20)  # the host is short
    assert fraction(host_bytes=1e9) == pytest.approx((10 * 2 - 4) / 20)  # the bus is


@pytest.mark.parametrize("name", ["bandwidth", "layer_seconds", "host_bytes"])
def test_more_of_anything_never_gives_less(name):
    found = [fraction(**{name: GIVEN[name] * factor}) for factor in (0.01, 0.5, 1, 2, 100)]
    assert found == sorted(found)
    assert found[0] == 0.0 < found[-1]


def test_more_layers_never_give_more():
    found = [fraction(layers=layers, host_bytes=1000.0) for layers in (1, 2, 3, 50, 100, 1000)]
    assert found == sorted(found, reverse=True)


def test_it_lies_between_nothing_and_all():
    assert fraction(kept=1e9) == 0.0
    assert fraction(other=1e-3, host_bytes=1e9) == 1.0
    assert fraction(layers=2, host_bytes=0.0, bandwidth=100.0) == 1.0
    assert fraction(other=0.0) == 1.0


def test_the_chosen_share_keeps_both_conditions():
    for kept, other in ((1.0, 50.0), (3.0, 7.0), (0.0, 1.0)):
        share = fraction(kept, other)
        assert kept + share * other <= GIVEN["bandwidth"] * GIVEN["layer_seconds"] + 1e-9
        assert (GIVEN["layers"] - 2) * (kept + share * other) <= GIVEN["host_bytes"] + 1e-9
