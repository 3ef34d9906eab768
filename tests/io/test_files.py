"""JSON files are checked against a schema when they are read; errors name the file and the field."""

import dataclasses
import os
from typing import Annotated

import msgspec
import pytest

from peftjax.core.errors import PeftError
from peftjax.io.files import read_as, read_json


@dataclasses.dataclass(frozen=True)
class Options:
    rank: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    names: list[str] = dataclasses.field(default_factory=list)
    scale: float = 1.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"rank": "a"}', r"'rank': Expected `int`, got `str` \('a'\)"),
        ('{"rank": true}', "'rank': Expected `int`, got `bool`"),
        ("{}", "missing required field `rank`"),
        ('{"rank": 10000000000000000000000000}', "'rank': Expected `int` <= 1000000"),
        ('{"rank": 1e400}', "'rank': Expected `int`, got `float`"),
        ('{"rank": 1, "names": ["a", 3]}', r"'names\[1\]': Expected `str`, got `int` \(3\)"),
        ('{"rank": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "nests too deeply"),
        ('{"rank": 1, "names": ["\\ud800"]}', "half of a surrogate pair"),
        ("[]", "holds no JSON object"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, text, complaint):
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(PeftError, match=f"options.json.*{complaint}"):
        read_as(Options, file)


def test_an_object_becomes_its_schema_and_unknown_fields_are_left(tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"rank": 3, "scale": 2, "other": 1}')
    assert read_as(Options, file) == Options(rank=3, scale=2.0)
    assert read_json(file)["other"] == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "options.json")
    with pytest.raises(PeftError, match=r"options.json: it is a pipe or a device"):
        read_json(tmp_path / "options.json")


def test_an_error_that_shows_a_long_value_is_cut_in_the_middle():
    text = str(PeftError(f"rank is {'9' * 50_000}, but has to be at most 3"))
    assert len(text) < 2000
    assert text.startswith("rank is 999")
    assert text.endswith("999, but has to be at most 3")
    assert str(PeftError("short")) == "short"
