r"""What does a new projection of GaLore cost, and how much of the gradient does it keep?

    pip install -e ".[experiments]"
    python -m experiments.refresh_cost.run --training.data wikitext2

Expected, the time of a refresh of all bases relative to a step, median [range]:

    | results | of | is |
    |---|---|---|
    | wikitext2 | SVD | 1.37 [1.32, 1.38] steps |
    | wikitext2 | Gram | 0.99 [0.97, 1.01] steps |
    | wikitext2 | subspace, 0 | 0.92 [0.89, 0.94] steps |
    | wikitext2 | subspace, 1 | 2.35 [2.27, 2.38] steps |
    | wikitext2 | subspace, 2 | 3.84 [3.73, 4.00] steps |

Singular value decomposition, eigenvectors of the Gram matrix and subspace iteration (0, 1 and 2 iterations,
from a random start or from the projection before), by

- the time of one basis of one matrix, and of a whole refresh of the small Llama beside the time of its step,
  one of each in turn;
- the share of the gradients that the bases keep while the small Llama is trained with AdamW: of the batch
  that they are made from, and of the next one;
- the loss of `experiments.pretrain_bytes.run` with GaLore, at one learning rate for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import peftjax as pj
from experiments.harness.contenders import Contender
from experiments.harness.per_matrix import STACK_AXES
from experiments.harness.pretraining import full, galore, optimizer_of
from experiments.harness.record import open_record, provenance
from experiments.harness.report import write_report
from experiments.harness.timing import Call, measure_in_turn, repeated
from experiments.harness.training import make_programs, train
from experiments.pretrain_bytes import run
from experiments.pretrain_bytes.data import read_text, small_llama, training_batches
from experiments.refresh_cost.bases import BASES, Basis, compressed_side
from experiments.refresh_cost.report import REPORT, STEP
from peftjax.core import tree
from peftjax.losses import cross_entropy
from peftjax.methods.projected._refresh import OVERSAMPLING
from peftjax.optim.bases import captured_energy
from peftjax.train.step import TrainingState

Energy = dict[str, dict[str, list[float]]]
"""By basis and start: the steps, and the mean over all matrices for the same and for the next batch."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure on."""

    training: run.Options
    """The runs, of more seeds another time; `rates` and `only` are not used. The gradients are looked at
    every `every` steps."""
    output: Path | None = None
    """Where the results go; by default a folder named like the data beside this file."""
    rate: float = 0.03
    """GaLore's peak learning rate."""
    plain_rate: float = 9e-4
    """AdamW's, of the run whose gradients are looked at."""
    shapes: tuple[tuple[int, int], ...] = ((256, 256), (512, 512), (512, 1376), (1024, 1024), (1024, 2736))
    """Of the matrices whose bases are timed, at a quarter of the smaller side."""
    rounds: int = 5
    """How often each is timed."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or Path(__file__).parent / "results" / self.training.data.name


def time_bases(shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of a basis of one random matrix."""
    key = jax.random.key(0)
    g = jax.random.normal(key, shape)
    rank, side = min(shape) // 4, compressed_side(g)
    calls = {}
    for basis in BASES:
        find = jax.jit(partial(basis.find, rank=rank, side=side, key=key))
        calls[basis.label] = partial(find, g)
    return measure_in_turn(calls, rounds)


def contender(basis: Basis) -> Contender:
    """GaLore with a basis."""
    return Contender(basis.label, partial(galore, **basis.options))


def time_refreshes(options: run.Options, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of the small Llama and of its refreshes."""
    text = read_text(options.data)
    model = small_llama(options.width, options.layers, options.length)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = next(training_batches(text.train, options.length, options.batch, 0))

    def calls(basis: Basis) -> tuple[Call, Call]:
        """Its step and its refresh, each on a state of its own."""
        one = contender(basis)
        method = one.method(options.setting)
        programs = make_programs(model, method, optimizer_of(one, options.setting, options.schedule))
        first = programs.start(method, params, 1.0, 0)

        def step(state: TrainingState) -> TrainingState:
            """A step before which nothing is due: always the second one."""
            return dataclasses.replace(programs.step(state, batch)[0], step=1)

        refreshed = programs.advance(jax.tree.map(jnp.copy, first), batch)
        return (
            repeated(step, dataclasses.replace(refreshed, step=1)),
            repeated(lambda state: programs.advance(state, batch), first),
        )

    found = {basis.label: calls(basis) for basis in BASES}
    step, _ = found[BASES[0].label]
    refreshes = {label: refresh for label, (_, refresh) in found.items()}
    return measure_in_turn({STEP: step} | refreshes, rounds)


def measure_energy(options: run.Options, rate: float) -> Energy:
    """What bases keep of the gradients of a run of AdamW."""
    text = read_text(options.data)
    model = small_llama(options.width, options.layers, options.length)
    key = jax.random.key(0)
    batches = training_batches(text.train, options.length, options.batch, 1)
    found: Energy = {}
    before: dict[str, jax.Array] = {}

    @jax.jit
    def gradients(params: Any, batch: Any) -> dict[str, jax.Array]:
        whole = jax.grad(lambda params: cross_entropy(model(params, batch), batch))(params)
        return {path: leaf for path, leaf in tree.named_leaves(whole).items() if leaf.ndim == STACK_AXES}

    @partial(jax.jit, static_argnums=0)
    def kept(basis: Basis, same: Any, following: Any, known: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        shares, new = [], {}
        for path, g in same.items():
            side = compressed_side(g)
            new[path] = basis.find(g, options.rank, side, key, known.get(path))
            shares.append([captured_energy(one, new[path], side).mean() for one in (g, following[path])])
        return jnp.mean(jnp.asarray(shares), axis=0), new

    def visit(state: TrainingState) -> None:
        nonlocal before
        params = method.apply(state.frozen, state.trainable)
        same, following = gradients(params, next(batches)), gradients(params, next(batches))
        exact = before
        for basis in BASES:
            starts = {"": {}}
            if basis.method == "subspace":
                starts = {", random start": {}} | ({", start before": before} if before else {})
            for name, known in starts.items():
                shares, new = kept(basis, same, following, known)
                exact = new if basis.method == "svd" else exact
                entry = found.setdefault(basis.label + name, {"steps": [], "same": [], "next": []})
                for part, value in zip(entry, (state.step, *map(float, shares))):
                    entry[part].append(value)
        before = exact

    method = pj.full()
    programs = make_programs(
        model, method, optimizer_of(Contender("AdamW", full), options.setting, options.schedule)
    )
    train(
        programs,
        programs.start(method, jax.jit(model.init)(key), rate, 0),
        training_batches(text.train, options.length, options.batch, 0),
        options.steps,
        every=options.every,
        visit=visit,
    )
    return found


def measure_losses(options: run.Options, rate: float, folder: Path) -> dict[str, list[float | None]]:
    """The test loss of GaLore with each basis, by seed."""
    text = read_text(options.data)
    settings = dataclasses.asdict(options) | {"data": options.data.name, "rate": rate}
    for name in ("output", "only", "rates", "wider", "seeds"):
        del settings[name]
    record = open_record(folder, settings)
    found: dict[str, list[float | None]] = {}
    for basis in BASES:
        fit: Callable[[float, int], run.Run] = run.make_runner(contender(basis), text, options)
        found[basis.label] = []
        for seed in range(options.seeds):
            identity = {"label": basis.label, "rate": rate, "seed": seed}
            finished = record.recall(identity, partial(fit, rate, seed))
            found[basis.label].append(finished["test"])
    return found


def main(options: Options) -> None:
    """Measure all, and write it; finished runs are not repeated."""
    results = {
        **provenance("jax", "optax"),
        "oversampling": OVERSAMPLING,
        "rank": options.training.rank,
        "rate": options.rate,
        "bases": {f"{n} x {m}": time_bases((n, m), options.rounds) for n, m in options.shapes},
        "refreshes": time_refreshes(options.training, options.rounds),
        "energy": measure_energy(options.training, options.plain_rate),
        "losses": measure_losses(options.training, options.rate, options.folder),
    }
    print(write_report(options.folder, REPORT, results))


REPORTS = {"wikitext2": REPORT}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
