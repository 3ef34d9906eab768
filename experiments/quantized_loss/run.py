r"""What does a base of few bits cost a language model, and how much of it does a LoRA bring back?

    pip install -e ".[experiments]"
    python -m experiments.quantized_loss.run --data wikitext2

Expected, the loss on the test part in nats a byte, rounded and after a LoRA on the codes:

    | results | of | is |
    |---|---|---|
    | wikitext2 | float32 | 1.9942, 1.9725 |
    | wikitext2 | nf4 | 1.9953, 1.9692 |
    | wikitext2 | int4 | 1.9970, 1.9706 |
    | wikitext2 | int3 | 2.0035, 1.9752 |
    | wikitext2 | int2 | 2.1043, 1.9751 |

A small Llama over bytes is trained on a folder of text files (WikiText-2), rounded to each format, and
trained on the same text with a LoRA of every linear layer of its blocks, at the learning rate that is best on
the held-out part. A LoRA on the floats is what such training gives without any rounding. The adapter is then
merged into arrays, and into codes, which rounds once more. One base and one seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import peftjax as pj
from experiments.harness.contenders import Contender, Setting
from experiments.harness.plot import saved
from experiments.harness.pretraining import Schedule, full, optimizer_of
from experiments.harness.progress import progress_bar
from experiments.harness.quantized_bases import BASES
from experiments.harness.record import open_record, provenance
from experiments.harness.report import Report, Results, table, write_report
from experiments.harness.training import make_programs, train
from experiments.pretrain_bytes.data import Text, first_batches, read_text, small_llama, training_batches
from peftjax.backbone.backbone import Params
from peftjax.core import tree
from peftjax.losses import Batch, cross_entropy
from peftjax.weights.base import dense
from peftjax.weights.quantized import Quantized

FLOATS = "float32"
FORMATS: dict[str, Callable[[], pj.Transform] | None] = {FLOATS: None, **BASES}
"""The bases by name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The base's training, and the adapters'."""

    data: Path
    """A folder of .txt files."""
    output: Path | None = None
    """Where the results go; by default a folder named like the data beside this file."""
    width: int = 96
    """Of the model, a multiple of 32."""
    layers: int = 4
    """Blocks."""
    length: int = 128
    """Bytes of a row."""
    batch: int = 8
    """Rows a step."""
    steps: int = 400
    """Of the base."""
    rate: float = 1e-2
    """Peak learning rate of the base."""
    adapter_steps: int = 100
    """Of each LoRA."""
    rank: int = 8
    """Of each LoRA; alpha is twice that."""
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Peak learning rates of the LoRAs, of which each format takes its best."""
    tested: int = 16
    """Batches of the held-out part, and of the test part."""
    only: tuple[str, ...] = ()
    """Names of the formats to run; all where none is given. The report has all that is recorded."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or Path(__file__).parent / "results" / self.data.name


Run = dict[str, Any]
Score = Callable[[Params, Sequence[Batch]], float]


def make_score(model: Any) -> Score:
    """`(params, batches) -> mean loss`, of arrays and of codes."""
    run = jax.jit(pj.adapt(lambda params, batch: cross_entropy(model(params, batch), batch)))
    return lambda params, batches: sum(float(run(params, batch)) for batch in batches) / len(batches)


def trained_base(options: Options, text: Text) -> Params:
    """The parameters that are rounded."""
    setting = Setting(options.steps)
    model = small_llama(options.width, options.layers, options.length)
    method = pj.full()
    programs = make_programs(model, method, optimizer_of(Contender("AdamW", full), setting, Schedule()))
    start = programs.start(method, jax.jit(model.init)(jax.random.key(0)), options.rate, 0)
    batches = training_batches(text.train, options.length, options.batch, 0)
    state = train(programs, start, batches, options.steps).state
    return method.merge(state.frozen, state.trainable)


def make_runner(name: str, params: Params, text: Text, options: Options) -> Callable[[float], Run]:
    """`rate -> run` of a format; its programs are compiled with the first."""
    model = small_llama(options.width, options.layers, options.length)
    lora = pj.lora(rank=options.rank, alpha=2.0 * options.rank)
    make, setting = FORMATS[name], Setting(options.adapter_steps)
    method = lora if make is None else pj.chain(make(), lora)
    programs = make_programs(model, method, optimizer_of(Contender(name, full), setting, Schedule()))
    score = make_score(model)
    held_out, test = (
        first_batches(part, options.length, options.batch, options.tested)
        for part in (text.held_out, text.test)
    )

    def run(rate: float) -> Run:
        start = programs.start(method, params, rate, 0)
        found = {**coded_sizes(params, start.frozen.params), "rounded": score(start.frozen.params, test)}
        batches = training_batches(text.train, options.length, options.batch, 1)
        state = train(programs, start, batches, options.adapter_steps).state
        whole = method.merge(state.frozen, state.trainable)
        codes, _ = method.merge(state.frozen, state.trainable, keep_dense=False)
        return {
            **found,
            "held_out": programs.evaluate(state, held_out)["loss"],
            "adapted": programs.evaluate(state, test)["loss"],
            "merged": score(whole, test),
            "merged_into_codes": score(codes, test),
        }

    return run


def coded_sizes(params: Params, rounded: Params) -> dict[str, float | None]:
    """Bits a coded weight, and how far all of them are from what they were, relative to their size."""
    leaves = tree.named_leaves(params)
    coded = {path: w for path, w in tree.named_leaves(rounded).items() if isinstance(w, Quantized)}
    if not coded:
        return {"bits": 32.0, "error": 0.0}
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(coded))
    apart = sum(float(jnp.sum((dense(w) - leaves[path]) ** 2)) for path, w in coded.items())
    size = sum(float(jnp.sum(leaves[path] ** 2)) for path in coded)
    return {"bits": bits / sum(leaves[path].size for path in coded), "error": math.sqrt(apart / size)}


def main(options: Options) -> None:
    """Run what is missing, and write what is recorded."""
    text = read_text(options.data)
    settings = dataclasses.asdict(options) | {"data": options.data.name}
    for name in ("output", "only"):
        del settings[name]
    record = open_record(options.folder, settings)
    names = [name for name in FORMATS if not options.only or name in options.only]
    base = cache(lambda: trained_base(options, text))
    fit = cache(lambda name: make_runner(name, base(), text, options))
    with progress_bar(len(names) * len(options.rates)) as advance:
        for name in names:
            for rate in options.rates:
                identity = {"format": name, "rate": rate}
                found = record.recall(identity, lambda name=name, rate=rate: fit(name)(rate))
                advance(f"{name}, learning rate {rate:g}: {found['held_out']:.4f}")
    best = [
        min((run for run in record.runs if run["format"] == name), key=lambda run: run["held_out"])
        for name in FORMATS
        if any(run["format"] == name for run in record.runs)
    ]
    results = {**provenance("jax", "optax"), "settings": settings, "lines": best}
    print(write_report(options.folder, REPORT, results))


HEADER = (
    "format", "bits", "error", "rounded", "LoRA on it", "merged", "merged into codes", "learning rate",
)  # fmt: skip


def report(results: Results) -> str:
    """The best run of each format."""
    settings = results["settings"]
    rows = [
        [
            line["format"],
            f"{line['bits']:.3f}",
            f"{line['error']:.3f}",
            *(f"{line[name]:.4f}" for name in ("rounded", "adapted", "merged", "merged_into_codes")),
            f"{line['rate']:g}",
        ]
        for line in results["lines"]
    ]
    text = (
        f"Test loss in nats a byte (perplexity a byte is its exponential) of a Llama of width "
        f"{settings['width']} with {settings['layers']} blocks, {settings['steps']} steps of training and "
        f"{settings['adapter_steps']} of a LoRA of rank {settings['rank']}. Bits and error are of the coded "
        "weights, the error relative to their size."
    )
    return "\n".join([text, "", *table(HEADER, rows), ""])


def draw(results: Results, file: Path) -> None:
    """The loss rounded, with a LoRA, and merged into codes, of each format."""
    lines = results["lines"]
    kinds = {"rounded": "#8a8a8a", "adapted": "#1b6ca8", "merged_into_codes": "#c8553d"}
    with saved(file, size=(7, 0.8 + 0.32 * len(lines))) as (_, (axis,)):
        for kind, color in kinds.items():
            losses = [line[kind] for line in lines]
            axis.scatter(losses, range(len(lines)), color=color, label=kind.replace("_", " "))
        axis.set_yticks(range(len(lines)), [f"{line['format']} ({line['bits']:.2f} bits)" for line in lines])
        axis.invert_yaxis()
        axis.set_xlabel("test loss, nats a byte")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)


def answer(results: Results) -> dict[str, str]:
    """The loss rounded and with a LoRA of a few formats."""
    wanted = (FLOATS, "nf4", "int4", "int3", "int2")
    return {
        line["format"]: f"{line['rounded']:.4f}, {line['adapted']:.4f}"
        for line in results["lines"]
        if line["format"] in wanted
    }


REPORT = Report(text=report, draw=draw, answer=answer, levels=2)
REPORTS = {"wikitext2": REPORT}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
