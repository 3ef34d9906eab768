import errno
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import no_file_larger_than, opened, state

from peftjax.core.errors import PeftError
from peftjax.io import checkpoint


def test_round_trip(tmp_path):
    saved = state(4, 2.5)
    with opened(tmp_path) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, saved) is None
        checkpoint.save(checkpoints, saved)
    with opened(tmp_path) as checkpoints:
        found = checkpoint.restore_latest(checkpoints, state(0))
    assert (found.step, found.data, found.progress) == (4, saved.data, saved.progress)
    assert found.key.dtype == saved.key.dtype
    np.testing.assert_array_equal(jax.random.bits(found.key), jax.random.bits(saved.key))
    for part in ("trainable", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), getattr(saved, part))


def large(step):
    values = np.random.default_rng(0).normal(size=10**6).astype(np.float32)  # does not compress
    return replace(state(step), trainable={"w": jnp.asarray(values)})


def fill(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, replace(large(1), trainable={"w": jnp.zeros(10**6)}))
        assert checkpoint.complete_steps(checkpoints) == [1]
        with no_file_larger_than(10**6):
            checkpoint.save(checkpoints, large(2))
            checkpoint.complete_steps(checkpoints)


def test_when_the_disk_is_full_the_earlier_checkpoint_stays(tmp_path):
    with pytest.raises(PeftError, match=r"cannot write a checkpoint to .*: File too large; the earlier"):
        fill(tmp_path)
    with opened(tmp_path) as checkpoints:
        assert checkpoint.complete_steps(checkpoints) == [1]
        assert checkpoint.restore_latest(checkpoints, large(0)).step == 1
        checkpoint.save(checkpoints, large(2))
        assert checkpoint.complete_steps(checkpoints) == [2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_the_operating_system_refuses_while_saving_is_one_sentence(number, tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state(1))

        def refuse(*args, **options):
            raise ValueError("not written") from OSError(number, os.strerror(number))

        monkeypatch.setattr(checkpoints, "save", refuse)
        with pytest.raises(PeftError, match=os.strerror(number)):
            checkpoint.save(checkpoints, state(2))
        assert checkpoint.complete_steps(checkpoints) == [1]


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    big = replace(state(1), trainable={"w": jnp.arange(4e6)})
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1, tree), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, big)
        trainable = big.trainable
        for _ in range(5):
            trainable = overwrite(trainable)
        found = checkpoint.restore_trainable(checkpoints, 1, trainable)
    np.testing.assert_array_equal(found["w"], np.arange(4e6, dtype=np.float32))


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: None, 4: 0.9, 5: 0.2, 6: None, 7: 0.5}
    with opened(tmp_path, keep_last=2) as checkpoints:
        for step, score in scores.items():
            checkpoint.save(checkpoints, state(step), score)
        assert checkpoint.complete_steps(checkpoints) == [2, 6, 7]
    for step, score, kept in ((8, None, [2, 8]), (9, 0.9, [2, 9]), (10, 0.95, [10])):
        with opened(tmp_path) as checkpoints:
            checkpoint.save(checkpoints, state(step), score)
            assert checkpoint.complete_steps(checkpoints) == kept


def test_incomplete_folders_are_ignored(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state(3))
    (tmp_path / "9" / "trainable").mkdir(parents=True)
    (tmp_path / "8.orbax-checkpoint-tmp").mkdir()
    with opened(tmp_path) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state(0)).step == 3
        checkpoint.save(checkpoints, state(4))
        assert checkpoint.complete_steps(checkpoints) == [4]
        checkpoint.save(checkpoints, state(9))
    with opened(tmp_path) as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state(0)).step == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["9", "9.incomplete"]


@pytest.mark.slow
def test_another_model(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state(3))
        with pytest.raises(PeftError, match=r"'blocks/query/a' is float32\[2, 3\] in the checkp"):
            checkpoint.restore_latest(checkpoints, state(0, width=4))
        other = {**state(0).trainable, "extra": jnp.zeros(1)}
        with pytest.raises(PeftError, match=r"'extra' is absent in the checkpoint"):
            checkpoint.restore_trainable(checkpoints, 3, other)
        with pytest.raises(PeftError, match=r"no checkpoint of step 5; .* steps 3"):
            checkpoint.restore_trainable(checkpoints, 5, other)
