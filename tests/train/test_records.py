"""Metrics, progress, usage, early stopping and identity."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from peftjax.core.errors import PeftError
from peftjax.train import early_stopping, throughput
from peftjax.train.early_stopping import Best
from peftjax.train.metrics import cut, open_metrics, read_metrics
from peftjax.train.output_folder import claim_folder, run_identity
from peftjax.train.progress import show_progress


def test_metrics_of_repeated_steps_are_cut(tmp_path):
    with open_metrics(tmp_path, 0, tensorboard=False) as write:
        for step in (1, 2, 3):
            write(step, {"loss": step / 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with open_metrics(tmp_path, 2, tensorboard=False) as write:
        write(3, {"loss": 9.0, "tokens_per_second": None})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 9.0, "tokens_per_second": None},
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 1, "lo\n', "line 2 is damaged"),
        ("[1]\n", "line 2: Expected `object`"),
        ("{}\n", "line 2: .*missing required field `step`"),
        ('{"step": "1"}\n', "line 2: 'step': Expected `int`"),
        ('{"step": 1, "tokens_per_second": "many"}\n', "line 2: 'tokens_per_second': Expected `float"),
        ("[" * 100_000 + "\n", "line 2 is damaged: .*nests too deeply"),
        (b"\xff\n", "is damaged"),
    ],
    ids=["cut", "list", "no step", "text", "rate", "deep", "bytes"],
)
def test_a_damaged_line_of_the_metrics_is_named_and_the_file_stays(line, complaint, tmp_path):
    file = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + (line if isinstance(line, bytes) else line.encode()) + b'{"step": 2}\n'
    file.write_bytes(content)
    with pytest.raises(PeftError, match=f"metrics.jsonl.*{complaint}"):
        cut(file, 1)
    with pytest.raises(PeftError, match=f"metrics.jsonl.*{complaint}"):
        read_metrics(file)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with open_metrics(tmp_path, 0, tensorboard=True) as write:
        write(1, {"loss": 0.5, "tokens_per_second": None})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content
    assert b"tokens_per_second" not in content


def test_plain_lines_without_a_terminal():
    console = Console(file=io.StringIO())
    with show_progress(20, 0, console) as report:
        report(10, {"loss": 0.25, "grad_norm": 1.0, "tokens_per_second": 1234.5})
    assert console.file.getvalue() == "step 10/20: loss 0.2500, 1,234 tokens/s\n"


def test_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with show_progress(20, 4, console) as report:
        report(10, {"loss": 0.25})
        report(10, {"eval_accuracy": 0.5})
    assert "10/20" in console.file.getvalue()
    assert "loss 0.2500, eval accuracy 0.5000" in console.file.getvalue()


def batch(tokens, length):
    mask = np.zeros((2, length), np.int32)
    mask.flat[:tokens] = 1
    weights = np.array([1.0, 0.0], np.float32)
    return {"input_ids": np.zeros_like(mask), "attention_mask": mask, "weights": weights}


def test_throughput_skips_compilation_pauses_and_padding(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(now)))
    timed = throughput.Throughput()
    for item in (batch(7, 8), batch(5, 8), batch(6, 8)):  # the first compiles
        timed.before(item)
        timed.after(item, jnp.zeros(1))
    timed.before(batch(9, 16))  # compiles: time stands still, 1 s after it began
    timed.after(batch(9, 16), jnp.zeros(1))
    assert timed.seconds == 1.0
    assert timed.take() == {"tokens_per_second": 11.0, "labels_per_second": 2.0}
    assert timed.take() == {"tokens_per_second": None, "labels_per_second": None}


def test_peak_memory():
    before = throughput.peak_memory()["peak_host_bytes"]
    block = np.ones(2**27, np.uint8)
    after = throughput.peak_memory()["peak_host_bytes"]
    assert 2**20 < before <= after < 2**40
    assert block.nbytes < after


def test_early_stopping():
    best = Best()
    for step, score in ((1, 0.5), (2, 0.5), (3, 0.4)):
        best = early_stopping.update(best, step, score)
    assert best == Best(step=1, score=0.5, waited=2)
    assert early_stopping.is_over(best, 2)
    assert not early_stopping.is_over(best, 3)
    assert not early_stopping.is_over(best, None)
    assert early_stopping.update(best, 4, 0.6) == Best(step=4, score=0.6)


def test_identity(tmp_path):
    params = {"w": jnp.zeros((2, 3))}
    lora = {"name": "lora", "rank": 8}
    claim_folder(tmp_path / "run", run_identity(lora, params))
    claim_folder(tmp_path / "run", run_identity(lora, {"w": jnp.ones((2, 3))}))
    with pytest.raises(PeftError, match=r"method.rank is 8 there and 4 in this run"):
        claim_folder(tmp_path / "run", run_identity({**lora, "rank": 4}, params))
    with pytest.raises(PeftError, match="model is"):
        claim_folder(tmp_path / "run", run_identity(lora, {"w": jnp.zeros((3, 2))}))


@pytest.mark.parametrize("content", ["", "[]", '{"method": ', '{"a":' * 900 + "1" + "}" * 900, "\0"])
def test_a_damaged_identity_is_named(content, tmp_path):
    identity = run_identity({"name": "lora"}, {"w": jnp.zeros(2)})
    claim_folder(tmp_path, identity)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(PeftError, match=r"run.json|belongs to another run") as error:
        claim_folder(tmp_path, identity)
    assert len(str(error.value)) < 1000
    assert (tmp_path / "run.json").read_text() == content
