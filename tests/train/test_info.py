"""What is noted beside an adapter is checked when it is read."""

import json

import pytest

from peftjax.core.errors import PeftError
from peftjax.train.adapter_info import Info, Noted, read_info, read_noted

GOOD = {"model": "m", "head": "classifier", "labels": ["a", "b"], "max_length": 64}


def write(folder, info):
    (folder / "adapter.json").write_text(json.dumps({"method": {"name": "lora"}, "seed": 0, "info": info}))
    return folder


def test_what_train_notes_is_read(tmp_path):
    more = {"task": "language", "source": "corpus", "rows": {"separator": " ", "packed": True}, "other": 1}
    info = read_info(write(tmp_path, {**GOOD, **more}))
    assert info == Info(**GOOD, task="language", source="corpus", rows=info.rows)
    assert (info.rows.separator, info.rows.packed, info.rows.train_on_prompt) == (" ", True, False)
    assert read_noted(write(tmp_path, {})) == Noted()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": "ab"}, "'labels': Expected `array`"),
        ({"labels": ["a", 1]}, r"'labels\[1\]': Expected `str`"),
        ({"max_length": "64"}, "'max_length': Expected `int`"),
        ({"max_length": 0}, "'max_length': Expected `int` >= 1"),
        ({"max_length": 2**40}, "'max_length': Expected `int` <="),
        ({"head": ["classifier"]}, "'head': Expected `str"),
        ({"task": "poetry"}, "'task': Invalid enum value 'poetry'"),
        ({"rows": []}, "'rows': Expected `object`"),
        ({"rows": {"packed": 1}}, "'rows.packed': Expected `bool`"),
    ],
)
def test_a_wrong_field_is_named(change, complaint, tmp_path):
    with pytest.raises(PeftError, match=f"adapter.json, info: {complaint}"):
        read_info(write(tmp_path, {**GOOD, **change}))


def test_an_adapter_that_says_too_little_is_not_of_train(tmp_path):
    with pytest.raises(PeftError, match="does not say its labels; it was not made by `train`"):
        read_info(write(tmp_path, {"model": "m", "head": "classifier"}))
