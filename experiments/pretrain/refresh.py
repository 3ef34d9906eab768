r"""What a new projection costs, how much of the gradient it keeps, and what it does to the loss.

    python -m experiments.pretrain.refresh --training.data wikitext2 \
        --training.output experiments/pretrain/results/refresh

Singular value decomposition, eigenvectors of the Gram matrix and subspace iteration (0, 1 and 2 iterations,
from a random start or from the projection before), by

- the time of one basis of one matrix, and of a whole refresh of the small Llama beside the time of its step,
  one of each in turn;
- the share of the gradients that the bases keep while the small Llama is trained with AdamW: of the batch
  that they are made from, and of the next one;
- the loss of `experiments.pretrain.run` with GaLore, at one learning rate for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import peftjax as pj
from experiments.pretrain import run
from experiments.pretrain.data import first_batches, read_text, small_llama, training_batches
from experiments.pretrain.entrants import Entrant, adamw, galore
from experiments.pretrain.loop import compile_programs, train
from experiments.pretrain.per_matrix import STACK_AXES
from experiments.pretrain.refresh_report import STEP, write_report
from experiments.pretrain.versions import versions
from experiments.pretrain.ways import WAYS, Way, compressed_side
from experiments.tuning.pace import measure_pace
from experiments.tuning.record import open_record
from peftjax.core import tree
from peftjax.losses import cross_entropy
from peftjax.methods.projected._refresh import OVERSAMPLING
from peftjax.optim.bases import captured_energy

Energy = dict[str, dict[str, list[float]]]
"""By way and start: the steps, and the mean over all matrices for the same and for the next batch."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure on."""

    training: run.Options
    """The runs, of more seeds another time; `rates` and `only` are not used. The gradients are looked at
    every `every` steps."""
    rate: float = 0.03
    """GaLore's peak learning rate."""
    plain_rate: float = 9e-4
    """AdamW's, of the run whose gradients are looked at."""
    shapes: tuple[tuple[int, int], ...] = ((256, 256), (512, 512), (512, 1376), (1024, 1024), (1024, 2736))
    """Of the matrices whose bases are timed, at a quarter of the smaller side."""
    rounds: int = 5
    """How often each is timed."""


def time_bases(shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of a basis of one random matrix."""
    key = jax.random.key(0)
    g = jax.random.normal(key, shape)
    rank, side = min(shape) // 4, compressed_side(g)
    steps = {}
    for way in WAYS:
        find = jax.jit(partial(way.find, rank=rank, side=side, key=key))
        steps[way.label] = lambda find=find: find(g)
    return measure_pace(steps, rounds)


def time_refreshes(options: run.Options, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of the small Llama and of its refreshes."""
    text = read_text(options.data)
    model = small_llama(options.width, options.layers, options.length)
    params, key = jax.jit(model.init)(jax.random.key(0)), jax.random.key(0)
    batch = next(training_batches(text.train, options.length, options.batch, 0))
    first = jnp.int32(0)

    def calls(way: Way) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Its step and its refresh, each on a state of its own."""
        method = galore(options.sizes, **way.options)
        programs = compile_programs(model, method, adamw, options.steps)
        frozen, trainable = method.init(key, params)
        state = trainable, programs.tx.init(trainable)
        (renewal,) = programs.renewals
        return (
            _repeated(lambda *own: programs.step(*own, frozen, batch, key)[:2], state),
            _repeated(lambda *own: renewal.run(*own, frozen, batch, first, key), state),
        )

    found = {way.label: calls(way) for way in WAYS}
    step, _ = found[WAYS[0].label]
    return measure_pace({STEP: step} | {label: refresh for label, (_, refresh) in found.items()}, rounds)


def _repeated(step: Callable[..., Any], state: Any) -> Callable[[], Any]:
    """One call after the other, each taking the memory of what the one before returned."""
    state = jax.tree.map(jnp.copy, state)

    def advance() -> Any:
        nonlocal state
        state = step(*state)
        return state

    return advance


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
    def kept(way: Way, own: Any, following: Any, known: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        shares, new = [], {}
        for path, g in own.items():
            side = compressed_side(g)
            new[path] = way.find(g, options.rank, side, key, known.get(path))
            shares.append([captured_energy(one, new[path], side).mean() for one in (g, following[path])])
        return jnp.mean(jnp.asarray(shares), axis=0), new

    def visit(step: int, frozen: Any, trainable: Any) -> None:
        nonlocal before
        params = method.apply(frozen, trainable)
        own, following = gradients(params, next(batches)), gradients(params, next(batches))
        exact = before
        for way in WAYS:
            starts = {"": {}}
            if way.basis == "subspace":
                starts = {", random start": {}} | ({", start before": before} if before else {})
            for name, known in starts.items():
                shares, new = kept(way, own, following, known)
                exact = new if way.basis == "svd" else exact
                entry = found.setdefault(way.label + name, {"steps": [], "same": [], "next": []})
                for part, value in zip(entry, (step, *map(float, shares))):
                    entry[part].append(value)
        before = exact

    method = pj.full()
    train(
        compile_programs(model, method, adamw, options.steps),
        jax.jit(model.init)(key),
        training_batches(text.train, options.length, options.batch, 0),
        first_batches(text.held_out, options.length, run.EVALUATED, 1),
        rate=rate,
        seed=0,
        steps=options.steps,
        every=options.every,
        visit=visit,
    )
    return found


def measure_losses(options: run.Options, rate: float) -> dict[str, list[float | None]]:
    """The test loss of GaLore with each way, by seed."""
    text = read_text(options.data)
    settings = dataclasses.asdict(options) | {"data": options.data.name, "rate": rate}
    for name in ("output", "only", "rates", "seeds"):
        del settings[name]
    record = open_record(options.output / "runs.json", settings)
    found: dict[str, list[float | None]] = {}
    for way in WAYS:
        entrant = Entrant(way.label, partial(galore, **way.options))
        fit = run.make_runner(entrant, text, options)
        found[way.label] = []
        for seed in range(options.seeds):
            identity = {"label": way.label, "rate": rate, "seed": seed}
            finished = record.recall(identity, lambda fit=fit, seed=seed: fit(rate, seed))
            found[way.label].append(finished["test"])
    return found


def main(options: Options) -> None:
    """Measure all, and write it; finished runs are not run again."""
    results = {
        **versions(),
        "oversampling": OVERSAMPLING,
        "rank": options.training.rank,
        "rate": options.rate,
        "bases": {f"{n} x {m}": time_bases((n, m), options.rounds) for n, m in options.shapes},
        "refreshes": time_refreshes(options.training, options.rounds),
        "energy": measure_energy(options.training, options.plain_rate),
        "losses": measure_losses(options.training, options.rate),
    }
    print(write_report(options.training.output, results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
