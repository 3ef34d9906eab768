import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from support import all_but_slow

import peftjax
from peftjax.core.errors import PeftError
from peftjax.methods.lowrank.lora import lora
from peftjax.methods.selection.plain import unfreeze
from peftjax.train.interrupt import Preempted
from peftjax.train.output_folder import run_identity
from peftjax.transform.chain import chain

TIMED = ("tokens_per_second", "labels_per_second", "peak_host_bytes", "peak_device_bytes")


def lines(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name not in TIMED} for row in rows]


def launch(directory):
    program = [sys.executable, str(Path(tiny.__file__)), str(directory)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def kill_at(process, metrics, step):
    """Kill the process once its metrics have a line of `step`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'{{"step": {step},' in metrics.read_text():
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = tiny.run(whole)
    kill_at(launch(broken), broken / "metrics.jsonl", 6)
    kill_at(launch(broken), broken / "metrics.jsonl", 22)
    finish(launch(broken))
    assert lines(broken) == lines(whole)
    assert [row["step"] for row in lines(whole) if "loss" in row] == list(range(1, 41))
    np.testing.assert_array_equal(np.load(broken / "kernel.npy"), expected.trainable["head"]["kernel"])


@pytest.mark.slow
def test_fit_learns_and_leaves_the_callers_arrays():
    frozen, trainable = tiny.parameters()
    result = tiny.run(trainable=trainable, frozen=frozen)
    assert result.step == 40
    assert result.best.score > 0.8
    assert not trainable["head"]["kernel"].any()


@pytest.mark.slow
def test_finished_run_does_nothing_more(tmp_path):
    config = replace(tiny.CONFIG, steps=4)
    first, second = (tiny.run(tmp_path, config) for _ in range(2))
    assert first.step == second.step == 4
    np.testing.assert_array_equal(first.trainable["head"]["kernel"], second.trainable["head"]["kernel"])
    assert len(lines(tmp_path)) == 5


@pytest.mark.slow
def test_early_stopping_returns_the_best(tmp_path):
    # A huge learning rate: accuracy jumps about, so that some evaluation is not the best.
    config = replace(tiny.CONFIG, steps=60, learning_rate=30.0, eval_every=2, early_stopping_patience=2)
    result = tiny.run(tmp_path, config)
    scores = {row["step"]: row["eval_accuracy"] for row in lines(tmp_path) if "eval_loss" in row}
    assert result.step == result.best.step + 4 == max(scores) < 60
    assert result.best.score == max(scores.values()) == scores[result.best.step]
    again = tiny.run(tmp_path, config)
    assert again.best == result.best
    np.testing.assert_array_equal(again.trainable["head"]["bias"], result.trainable["head"]["bias"])


@pytest.mark.slow
def test_not_finite_loss_names_the_step(tmp_path):
    tiny.run(tmp_path, replace(tiny.CONFIG, steps=4))

    def broken(params, batch, *, key=None):
        return tiny.forward(params, batch) * jnp.where(params["head"]["bias"].any(), jnp.nan, 1.0)

    with pytest.raises(PeftError, match="loss of step 5 is nan"):
        tiny.run(tmp_path, replace(tiny.CONFIG, steps=8, log_every=3), forward=broken)
    assert tiny.run(tmp_path, replace(tiny.CONFIG, steps=5)).step == 5


@pytest.mark.slow
def test_sigterm_saves_the_step_that_it_comes_in_and_the_run_goes_on_from_it(tmp_path):
    whole, told = tmp_path / "whole", tmp_path / "told"
    config = replace(tiny.CONFIG, steps=8, eval_every=8, save_every=None)
    tiny.run(whole, config)
    split = tiny.data()

    def make(rows):
        batch = tiny.batches.make_batch(split, rows, config.batch_size)
        made.append(batch)
        if len(made) == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch

    made = []
    stream = tiny.batches.shuffled_batches(
        split.lengths, config.batch_size, config.seed, make, window=tiny.batches.WINDOW
    )
    with pytest.raises(Preempted):
        tiny.run(told, config, batches=stream)
    assert [path.name for path in (told / "checkpoints").iterdir()] == ["3"]
    assert tiny.run(told, config).step == 8
    assert lines(told) == lines(whole)


def test_folder_of_another_run(tmp_path):
    config = replace(tiny.CONFIG, steps=1)
    tiny.run(tmp_path, config)
    with pytest.raises(PeftError, match="another run: method is 'tiny' there and 'lora'"):
        tiny.run(tmp_path, config, identity={"method": "lora"})


@pytest.mark.slow
def test_trains_with_accumulation_and_without_evaluation():
    config = replace(tiny.CONFIG, grad_accumulation=4)
    result = tiny.run(config=config, held_out=None)
    assert result.best.step is None
    assert jnp.abs(result.trainable["head"]["kernel"]).max() > 0.1


@pytest.mark.slow
def test_real_method_resumes(tmp_path):
    """A chain of adapters with dropout: interrupted and continued, it equals a run in one piece.

    So it does with an optimizer in the host's memory.
    """
    params = {**tiny.base(), **tiny.parameters()[1], "layer": {"kernel": jnp.eye(16)}}

    def forward(params, batch, *, key=None):
        return tiny.forward({**params, "embed": params["embed"] @ params["layer"]["kernel"]}, batch)

    method = chain(lora(rank=2, targets="layer/.*", dropout=0.1), unfreeze("head/.*"))
    frozen, trainable = method.init(jax.random.key(0), params)
    options = {"frozen": frozen, "trainable": trainable, "method": method}
    options["identity"] = run_identity(method.config, params)
    options["forward"] = method.model(forward)
    config = replace(tiny.CONFIG, schedule="constant", warmup_ratio=0.0, steps=20, keep_best=0)
    paged = replace(config, optimizer_memory="pinned_host")
    tiny.run(tmp_path, replace(paged, steps=8), **options)
    continued = tiny.run(tmp_path, paged, **options)
    whole = tiny.run(config=config, **options)
    jax.tree.map(np.testing.assert_array_equal, continued.trainable, whole.trainable)
    assert jnp.abs(whole.trainable["lora"]["layer/kernel"]["b"]).max() > 0.01
    assert whole.best.score > 0.6


@pytest.mark.parametrize("name", all_but_slow(("paca", "shira", "sara"), ()))
def test_in_place_resumes_and_equals_the_form_that_is_not(tmp_path, name):
    """The base in place is restored from the checkpoint; the caller's arrays stay as they were."""
    given = {"paca": {"rank": 4}, "shira": {"rank": 2}, "sara": {"density": 0.5, "reselect_at": 3}}[name]
    head = {"kernel": jax.random.normal(jax.random.key(3), (16, 3)), "bias": jnp.zeros(3)}
    params = {**tiny.base(), "head": head}
    config = replace(tiny.CONFIG, schedule="constant", warmup_ratio=0.0, steps=8, keep_best=0, save_every=3)

    def run(directory=None, steps=8, **options):
        method = getattr(peftjax, name)(targets=["head"], **given, **options)
        frozen, trainable = method.init(jax.random.key(0), params)
        own = {"method": method, "frozen": frozen, "trainable": trainable}
        return tiny.run(directory, replace(config, steps=steps), **own)

    run(tmp_path, steps=5, in_place=True)
    continued, whole = run(tmp_path, in_place=True), run(in_place=True)
    jax.tree.map(np.testing.assert_array_equal, continued.trainable, whole.trainable)
    plain = run()
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, whole.trainable, plain.trainable)
    assert whole.best == plain.best
