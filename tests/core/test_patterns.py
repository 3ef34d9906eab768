"""Users' regular expressions: named where they are none, ended where they take too long, else as `re`."""

import re
import time

import jax.numpy as jnp
import pytest

from peftjax.core.errors import PeftError
from peftjax.core.patterns import fullmatches, match
from peftjax.core.targets import pattern_value, select
from peftjax.hf.common import _layer_of

NAMES = [
    *("layers/0/query/kernel", "layers/11/query/kernel", "encoder.layer.3.output.dense", "head", ""),
    *("Blocks/up[0]/kernel", "a{e<=1}b", "two words/kernel", "ß/kernel", "x/y_1/lora"),
]


@pytest.mark.parametrize(
    "pattern",
    [
        *(r".*/(query|key)/kernel", r"layers/\d+/.*", r"(?i)LAYERS/.*", r"(?!head).*", r"[^/]*", r"\w+"),
        *(r"layers/(?:[0-9]|1[01])/.*", r"(?P<name>\w)/y_\d/.*", r".*\.dense", r"(.).*\1", ""),
        *(r"a\{e<=1\}b", "|".join(map(re.escape, NAMES)), r".*?[xß]/.{0,9}", r"^layers.*$", r"\S+"),
    ],
)
def test_patterns_match_what_re_matches(pattern):
    for name in NAMES:
        assert fullmatches(pattern, name) == (re.fullmatch(pattern, name) is not None)
        if not pattern.startswith("(?i)"):  # flags of the whole stand at its start
            found = match(pattern, name, before="(.*/)?(", after=")$")
            assert (found is None) == (re.match(f"(.*/)?({pattern})$", name) is None)


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        *((p, "is no regular expression") for p in ("(", "[a", "*a", r"\1", "(?<=a+)b", "a{9999999999999}")),
        *((p, "is no regular expression") for p in ("(" * 5000 + ")" * 5000, r"\p{L}", "(?P<a>x)(?P<a>x)")),
        *((p, "too many repetitions") for p in ("((a{999}){999}){999}", "(a{1,65535}){65535}")),
        ("a" * 10**7, "is longer than"),
        (7, "has to be text"),
        (["a"], "has to be text"),
    ],
)
def test_what_is_no_pattern_is_named(pattern, complaint):
    with pytest.raises(PeftError, match=complaint) as error:
        fullmatches(pattern, "layers/0/query/kernel")
    assert len(str(error.value)) < 400
    with pytest.raises(PeftError, match=complaint):
        match(pattern, "layers/0/query/kernel", before="(.*/)?(", after=")$")


def test_patterns_that_would_never_end_are_ended():
    name = "encoder/layers/12/attention/output/dense/kernel"
    start = time.process_time()
    with pytest.raises(PeftError, match="too long to match"):
        fullmatches(r"(?:\w|\w\w|/)*[!?]", name)
    with pytest.raises(PeftError, match="too long to match"):
        match(r"(?:\w|\w\w|/)*[!?]", name, before="(.*/)?(", after=")$")
    assert time.process_time() - start < 10


def test_a_pattern_that_takes_long_for_each_of_many_names_is_ended():
    def all_names():
        for number in range(10_000):
            fullmatches(r"(?:\w|\w\w|/)*[!?]", "k" * 24 + f"/{number}x")

    start = time.process_time()
    with pytest.raises(PeftError, match="too long to match"):
        all_names()
    assert time.process_time() - start < 10


def test_every_place_of_a_pattern_names_it():
    params = {"up": {"kernel": jnp.zeros((4, 4))}}
    for options in ({"targets": "(u"}, {"targets": "all-linear", "exclude": "(u"}):
        with pytest.raises(PeftError, match=r"'\(u' is no regular expression"):
            select(params, caller="lora", **options)
    with pytest.raises(PeftError, match=r"'\(u' is no regular expression"):
        pattern_value("up/kernel", {"(u": 3}, 1)


def test_a_pattern_of_layers_may_have_groups():
    assert _layer_of("model.layers.3.query", ("(layers|blocks)",)) == 3
