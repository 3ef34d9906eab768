"""Damaged checkpoints are named and set aside, and the run goes on from the newest whole one."""

import json
import logging
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
from checkpoints import opened, state
from support import quick_at

from peftjax.core.errors import PeftError
from peftjax.io import checkpoint


def arrays(folder):
    """The file of arrays that is read."""
    (file,) = (folder / "optimizer" / "d").iterdir()
    return file


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "arrays cut": lambda folder: cut(arrays(folder)),
    "arrays emptied": lambda folder: arrays(folder).write_bytes(b""),
    "arrays flipped": lambda folder: flip(arrays(folder)),
    "arrays deleted": lambda folder: arrays(folder).unlink(),
    "manifest cut": lambda folder: cut(folder / "trainable" / "manifest.ocdbt"),
    "manifest flipped": lambda folder: flip(folder / "trainable" / "manifest.ocdbt"),
    "manifest deleted": lambda folder: (folder / "trainable" / "manifest.ocdbt").unlink(),
    "tree deleted": lambda folder: (folder / "trainable" / "_METADATA").unlink(),
    "tree flipped": lambda folder: flip(folder / "trainable" / "_METADATA"),
    "sharding emptied": lambda folder: (folder / "optimizer" / "_sharding").write_bytes(b""),
    "run emptied": lambda folder: (folder / "run" / "metadata").write_bytes(b""),
    "run of another type": lambda folder: (folder / "run" / "metadata").write_text('{"step": "a"}'),
    "run deleted": lambda folder: shutil.rmtree(folder / "run"),
    "trainable deleted": lambda folder: shutil.rmtree(folder / "trainable"),
    "scores damaged": lambda folder: (folder / "metrics" / "metrics").write_text('{"score": '),
    "checksums damaged": lambda folder: cut(folder / "checksums.json"),
    "marker emptied": lambda folder: (folder / "_CHECKPOINT_METADATA").write_bytes(b""),
    "marker of another type": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text(
        '{"custom_metadata": "a"}'
    ),
    "marker deleted": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 3 and 7."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with opened(folder, keep_last=2) as checkpoints:
        for step in (3, 7):
            checkpoint.save(checkpoints, state(step, float(step)), 0.5)
    return folder


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("damage", quick_at(DAMAGES, every=4))
def test_the_newest_whole_checkpoint_is_taken(two, tmp_path, damage, checksums, caplog):
    if not checksums and damage in (
        "arrays flipped",
        "tree flipped",
        "checksums damaged",
        "sharding emptied",
    ):
        pytest.skip("of an old checkpoint without checksums only what Orbax cannot read is noticed")
    if not checksums and damage == "scores damaged":
        pytest.skip("Orbax reads the scores of all checkpoints when it starts")
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "7")
    if not checksums:
        (tmp_path / "7" / "checksums.json").unlink()
    with caplog.at_level(logging.WARNING), opened(tmp_path, keep_last=2) as checkpoints:
        found = checkpoint.restore_latest(checkpoints, state(0))
        assert checkpoint.complete_steps(checkpoints) == [3]
        checkpoint.save(checkpoints, state(7))
        assert checkpoint.complete_steps(checkpoints) == [3, 7]
    assert found.step == 3
    np.testing.assert_array_equal(found.trainable["blocks"]["query"]["a"], np.full((2, 3), 3.0))
    aside = "7.incomplete" if damage == "marker deleted" else "7.unreadable"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "7", aside]
    assert re.search(r"checkpoint of step 7 is unreadable \(.+\): set aside as", caplog.text)


def test_a_second_damage_of_a_step_leaves_the_first_folder(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for _ in range(2):
        DAMAGES["arrays cut"](tmp_path / "7")
        with opened(tmp_path, keep_last=2) as checkpoints:
            assert checkpoint.restore_latest(checkpoints, state(0)).step == 3
            checkpoint.save(checkpoints, state(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "7", "7.unreadable", "7.unreadable.2"]


@pytest.mark.parametrize("checksums", [True, False])
def test_when_none_is_whole_the_steps_are_named_each_time(two, tmp_path, checksums):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in (3, 7):
        DAMAGES["arrays deleted"](tmp_path / str(step))
        if not checksums:
            (tmp_path / str(step) / "checksums.json").unlink()
    for _ in range(2):
        with (
            pytest.raises(PeftError, match=r"no checkpoint in .* can be read: .*step 3 \("),
            opened(tmp_path) as checkpoints,
        ):
            checkpoint.restore_latest(checkpoints, state(0))
    assert (tmp_path / "3").exists()


def test_checkpoints_without_checksums_restore(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    (tmp_path / "7" / "checksums.json").unlink()
    with opened(tmp_path) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state(0)).step == 7


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_from_an_earlier_step(tmp_path):
    config = replace(tiny.CONFIG, steps=12, keep_last=3, keep_best=0)
    whole = tiny.run(tmp_path, config)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for damage, step in (("arrays flipped", 12), ("run emptied", 8)):
        DAMAGES[damage](tmp_path / "checkpoints" / str(step))
    again = tiny.run(tmp_path, config)
    np.testing.assert_array_equal(again.trainable["head"]["kernel"], whole.trainable["head"]["kernel"])
    losses = [
        [json.loads(line).get("loss") for line in rows]
        for rows in (before, (tmp_path / "metrics.jsonl").read_text().splitlines())
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_lost_best_checkpoint_is_named_with_what_to_do(tmp_path):
    # A huge learning rate: accuracy jumps about, so that the best evaluation is not the last.
    config = replace(tiny.CONFIG, steps=60, learning_rate=30.0, eval_every=2, early_stopping_patience=2)
    best, last = (result := tiny.run(tmp_path, config)).best.step, result.step
    cut(tmp_path / "checkpoints" / str(best) / "trainable" / "manifest.ocdbt")
    with pytest.raises(PeftError, match=rf"no checkpoint of step {best}.* with keep_best 0 the run ends"):
        tiny.run(tmp_path, config)
    assert tiny.run(tmp_path, replace(config, keep_best=0)).step == last
