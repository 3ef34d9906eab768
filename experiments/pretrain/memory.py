"""What pre-training a Llama needs with each optimizer, asked of the H200's compiler; nothing is run.

    JAX_PLATFORMS=cpu python -m experiments.pretrain.memory

See `experiments.memory.run` for what must be installed. The Llamas of 60 million to 7 billion parameters of
GaLore's paper, one row of 256 tokens, parameters and optimizer state in bfloat16, each block made again in
the backward pass, the loss over 512 tokens at a time. What a method does between steps, such as a new
projection, is one or more programs of its own, of which the table has the largest. Results of an earlier run
stay where this one does not replace them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import SingleDeviceSharding

import peftjax as pj
from experiments.memory.rows import Row
from experiments.memory.run import measure
from experiments.memory.subjects import Subject
from experiments.pretrain.entrants import Projection
from experiments.pretrain.memory_report import plot, report
from experiments.pretrain.memory_rows import ROWS, MemoryRow
from experiments.pretrain.sizes import SIZES, Size
from experiments.pretrain.versions import versions
from experiments.tuning.report import write_json
from peftjax.kept import nbytes
from peftjax.losses import classification
from peftjax.machines.machine import find_machine
from peftjax.models.backbone import Backbone
from peftjax.train.step import make_renewals

REMAT = "nothing_saveable"
EVERY, SCALE, STEPS = 200, 0.25, 10_000


@dataclasses.dataclass(frozen=True)
class Options:
    """What to ask the compiler, and where to write."""

    output: Path = Path("experiments/pretrain/results/memory")
    """Where memory.json, memory.md and memory.png go."""
    target: str = "h200"
    """The machine."""
    sizes: tuple[str, ...] = tuple(size.name for size in SIZES)
    """Which models."""
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    """Which methods."""
    renewals: bool = True
    """Whether to compile what is done between steps, too: minutes for the largest model."""


def measure_row(size: Size, row: MemoryRow, target: str, renewals: bool = True) -> dict[str, Any]:
    """The plan of a step, what lies beside the weights, and the peaks of what is done between steps.

    These are None where a method does something and it is not asked for.
    """
    projection = Projection(size.rank, EVERY, SCALE, STEPS)
    subject, optimizer = size.subject, row.optimizer(projection)
    method = row.method(projection)
    found = measure(subject, Row(row.name, lambda: method, REMAT), target, optimizer=optimizer)
    if "peak" not in found:
        return found
    model = dataclasses.replace(subject.model(), remat=REMAT)
    weights = nbytes(jax.tree.leaves(subject.params(model)))
    sizes = found["bytes"]
    resident = sum(sizes[kind] for kind in ("weights", "method_state", "trainable", "optimizer"))
    asked = renewals or not method.renewals
    between = renewal_peaks(subject, model, method, optimizer, target) if asked else None
    return {**found, "model": weights, "beside": resident - weights, "between": between, **versions()}


def renewal_peaks(
    subject: Subject,
    model: Backbone,
    method: pj.Transform,
    optimizer: optax.GradientTransformation,
    target: str,
) -> list[int]:
    """The bytes of each program between steps, as `Plan.bytes.peak` counts those of the step."""
    machine = find_machine(target)
    batch = subject.inputs(model)
    batch = {**batch, "weights": jax.ShapeDtypeStruct(batch["labels"].shape, jnp.float32)}
    key = jax.eval_shape(jax.random.key, 0)
    frozen, trainable = jax.eval_shape(method.init, key, subject.params(model))
    state = jax.eval_shape(method.optimizer(optimizer).init, trainable)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    place = SingleDeviceSharding(machine.device)
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (trainable, state, frozen, batch, count, key),
    )
    peaks = []
    programs = make_renewals(method.model(model), method, classification)
    for renewal, program in zip(method.renewals, programs):
        for part in range(renewal.parts(frozen)):
            lowered = program.program.trace(*inputs, part).lower(lowering_platforms=(machine.platform,))
            found = lowered.compile(compiler_options=dict(machine.options)).memory_analysis()
            new = found.output_size_in_bytes - found.alias_size_in_bytes
            peaks.append(found.argument_size_in_bytes + found.temp_size_in_bytes + new)
    return peaks


def main(options: Options) -> None:
    """Measure, and write what was measured after every row."""
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "memory.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for size in SIZES:
        for row in ROWS:
            if size.name not in options.sizes or row.name not in options.rows:
                continue
            found = measure_row(size, row, options.target, options.renewals)
            results.setdefault(size.name, {})[row.name] = found
            write_json(file, results)
            peaks = [found["peak"], *(found["between"] or ())] if "peak" in found else []
            said = ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in peaks) or found["reason"]
            print(f"{size.name}, {row.name}: {said}", flush=True)
    (options.output / "memory.md").write_text(report(results))
    plot(results, options.output / "memory.png")
    print(report(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
