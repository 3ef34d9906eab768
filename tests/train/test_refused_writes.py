"""A full disk, a quota or a read-only folder under a run: one sentence, and what was there is whole."""

import errno
import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import tiny
from checkpoints import no_file_larger_than, opened, state

import peftjax as pj
from peftjax.adapters.files import load_adapter, save_adapter
from peftjax.core.errors import PeftError
from peftjax.io import checkpoint
from peftjax.train.metrics import open_metrics

CONFIG = replace(
    tiny.CONFIG, steps=4, keep_last=1, keep_best=0, schedule="constant", warmup_ratio=0.0, log_every=2
)
PARAMS = {"head": {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}}
NOBODY = 65534


def adapted(value):
    method = pj.lora(rank=8, targets=["head"])
    frozen, trainable = method.init(jax.random.key(0), PARAMS)
    return method, frozen, jax.tree.map(lambda leaf: jnp.full_like(leaf, value), trainable)


def save_checkpoint(folder):
    with opened(folder) as checkpoints:
        checkpoint.save(checkpoints, state(1))
        checkpoint.complete_steps(checkpoints)


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(tmp_path):
    save_adapter(tmp_path, *adapted(1.0), seed=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with (
        pytest.raises(PeftError, match=r"cannot write \S*/adapter.safetensors: File too large; make room"),
        no_file_larger_than(1000),
    ):
        save_adapter(tmp_path, *adapted(2.0), seed=0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert load_adapter(tmp_path, PARAMS).trainable["head/kernel"]["a"].max() == 1


@pytest.mark.parametrize("tensorboard", [False, True])
def test_metrics_that_cannot_be_written_are_named_and_later_ones_follow_whole_lines(tmp_path, tensorboard):
    def lines(first, last):
        with open_metrics(tmp_path, first - 1, tensorboard=tensorboard) as write:
            for step in range(first, last):
                write(step, {"loss": step + 0.5})

    lines(1, 3)
    with pytest.raises(PeftError, match=r"cannot write \S+: File too large"), no_file_larger_than(200):
        lines(3, 100)
    lines(5, 7)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_events_that_cannot_be_written_do_not_hang_the_run(tmp_path):
    def write_many():
        with open_metrics(tmp_path, 0, tensorboard=True) as write:
            for step in range(100):
                os.truncate(tmp_path / "metrics.jsonl", 0)  # so that the events are the larger file
                write(step, {"loss": 0.5})

    full = r"cannot write \S*/tensorboard: File too large"
    with pytest.raises(PeftError, match=full), no_file_larger_than(300):
        write_many()


@pytest.mark.slow
def test_a_run_whose_disk_is_full_goes_on_from_its_checkpoint(tmp_path):
    tiny.run(tmp_path, replace(CONFIG, steps=3))
    with pytest.raises(PeftError, match="cannot write"), no_file_larger_than(500):
        tiny.run(tmp_path, CONFIG)
    continued, whole = tiny.run(tmp_path, CONFIG), tiny.run(config=CONFIG)
    assert jnp.array_equal(continued.trainable["head"]["kernel"], whole.trainable["head"]["kernel"])


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    tiny.run(tmp_path / "run", CONFIG)
    save_adapter(tmp_path / "adapter", *adapted(1.0), seed=0)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and folder != folder.parent and folder.name.startswith("pytest"):
            folder.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        for write in (
            lambda: tiny.run(tmp_path / "run", replace(CONFIG, steps=8)),
            lambda: tiny.run(tmp_path / "new", CONFIG),
            lambda: save_adapter(tmp_path / "adapter", *adapted(2.0), seed=0),
            lambda: save_adapter(tmp_path / "other", *adapted(2.0), seed=0),
        ):
            with pytest.raises(PeftError, match=r"cannot write (to the folder )?\S+: Permission denied"):
                write()
    finally:
        os.seteuid(0)
    assert tiny.run(tmp_path / "run", CONFIG).step == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_is_refused_when_a_file_takes_its_place_is_one_sentence(number, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    save_adapter(tmp_path, *adapted(1.0), seed=0)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PeftError, match=os.strerror(number)):
        save_adapter(tmp_path, *adapted(2.0), seed=0)
    with pytest.raises(PeftError, match=os.strerror(number)):
        save_checkpoint(tmp_path / "run")
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors", "run"]
