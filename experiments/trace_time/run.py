r"""How long does `adapt` trace beside the plain model and a LoRA by hand?

    python -m experiments.trace_time.run

Expected, the lowest and the highest of two runs of the wrappings:

    | results | of | is |
    |---|---|---|
    | decoder | jit, checkpoint, or both | 1.8 to 2.5 x the plain model, 0.8 to 1.3 x by hand |
    | decoder | not wrapped | 2.9 to 3.1 x the plain model, 1.8 x by hand |

Each row is a training step of 24 unrolled blocks that are wrapped as the row says; the times of the three are
medians of `rounds` traces taken in turn, with JAX's caches cleared before each.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import peftjax as pj
from experiments.harness.plot import saved
from experiments.harness.record import provenance
from experiments.harness.report import Report, Results, table, write_report


@dataclasses.dataclass(frozen=True)
class Options:
    """The model, and how often it is traced."""

    output: Path = Path(__file__).parent / "results" / "decoder"
    """Where the results go."""
    rounds: int = 7
    """Traces of each."""
    layers: int = 24
    """Blocks."""
    width: int = 64
    """Of the model."""
    inner: int = 256
    """Width of the feed-forward."""
    heads: int = 4
    """Attention heads."""
    rank: int = 8
    """Of LoRA."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The weights of a block."""
        square, up = (self.width, self.width), (self.width, self.inner)
        return dict.fromkeys("qkvo", square) | {"gate": up, "up": up, "down": up[::-1]}


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "not wrapped": lambda block: block,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint of jit": lambda block: jax.checkpoint(jax.jit(block)),
    "jit of checkpoint": lambda block: jax.jit(jax.checkpoint(block)),
}


def norm(x: jax.Array) -> jax.Array:
    """RMS normalization without a scale."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def block(linear: Callable[[str, jax.Array], jax.Array], x: jax.Array, heads: int) -> jax.Array:
    """One layer of a decoder, whose products are `linear(name, x)`."""
    hidden = norm(x)
    q, k, v = (linear(name, hidden).reshape(*x.shape[:-1], heads, -1) for name in "qkv")
    x = x + linear("o", jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
    hidden = norm(x)
    return x + linear("down", jax.nn.silu(linear("gate", hidden)) * linear("up", hidden))


def plain_block(layer: Any, x: jax.Array, *, heads: int) -> jax.Array:
    """The block on plain weights."""
    return block(lambda name, x: x @ layer[name]["kernel"], x, heads)


def by_hand(layer: Any, factors: Any, x: jax.Array, *, heads: int) -> jax.Array:
    """The block with a LoRA that is written into it."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        a, b = factors[name]["a"], factors[name]["b"]
        return x @ layer[name]["kernel"] + 2.0 * ((x @ a.T) @ b)

    return block(linear, x, heads)


def trace_seconds(loss: Callable[[Any], jax.Array], trained: Any) -> float:
    """The time to trace a gradient from nothing."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(loss)).trace(trained)
    return time.perf_counter() - start


def measure(options: Options, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """The times of a wrapping."""
    names = [f"layer_{number}" for number in range(options.layers)]
    shapes, rank = options.shapes, options.rank
    params = {n: {k: {"kernel": jnp.ones(s) / s[0]} for k, s in shapes.items()} for n in names}
    factors = {
        n: {k: {"a": jnp.ones((rank, s[0])), "b": jnp.zeros((rank, s[1]))} for k, s in shapes.items()}
        for n in names
    }
    method = pj.lora(rank=rank, targets="all-linear")
    frozen, trainable = method.init(jax.random.key(0), params)
    x = jnp.ones((2, 16, options.width))
    plain, hand = (wrap(partial(one, heads=options.heads)) for one in (plain_block, by_hand))

    def model(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = plain(params[name], x)
        return x

    def loss_by_hand(factors: Any) -> jax.Array:
        y = x
        for name in names:
            y = hand(params[name], factors[name], y)
        return y.sum()

    def loss_adapted(trainable: Any) -> jax.Array:
        return pj.adapt(model)(method.apply(frozen, trainable), x).sum()

    def loss_plain(params: Any) -> jax.Array:
        return model(params, x).sum()

    runs = [
        (
            trace_seconds(loss_plain, params),
            trace_seconds(loss_by_hand, factors),
            trace_seconds(loss_adapted, trainable),
        )
        for _ in range(options.rounds)
    ]
    return {
        "plain_seconds": statistics.median(plain for plain, _, _ in runs),
        "to_plain": [statistics.median(ours / plain for plain, _, ours in runs)],
        "to_hand": [statistics.median(ours / hand for _, hand, ours in runs)],
    }


def make_report(results: Results) -> str:
    """A row for each wrapping."""
    rows = [
        [
            row["blocks"],
            "" if row["plain_seconds"] is None else f"{row['plain_seconds']:.2f}",
            _range(row["to_plain"]),
            _range(row["to_hand"]),
        ]
        for row in results["rows"]
    ]
    about = f"Tracing a training step of {results['layers']} unrolled blocks; {results['machine']}."
    header = ["blocks", "plain model, s", "`adapt` / plain model", "`adapt` / LoRA by hand"]
    return "\n".join([about, "", *table(header, rows), ""])


def _range(values: list[float]) -> str:
    return " to ".join(f"{value:.1f}" for value in dict.fromkeys((min(values), max(values))))


def draw(results: Results, file: Path) -> None:
    """The ratios of each wrapping."""
    with saved(file, 2, size=(9, 3), sharey=True) as (_, axes):
        for axis, name, label in zip(axes, ("to_plain", "to_hand"), ("plain model", "LoRA by hand")):
            for place, row in enumerate(results["rows"]):
                axis.plot(row[name], [place] * len(row[name]), "o-")
            axis.set_yticks(range(len(results["rows"])), [row["blocks"] for row in results["rows"]])
            axis.set_xlabel(f"time of `adapt` / {label}")
            axis.set_xlim(left=0)


def answer(results: Results) -> dict[str, str]:
    """Both ratios."""
    return {
        row["blocks"]: f"{_range(row['to_plain'])} x the plain model, {_range(row['to_hand'])} x by hand"
        for row in results["rows"]
    }


REPORT = Report(make_report, draw, answer)
REPORTS = {"decoder": REPORT}


def main(options: Options) -> None:
    """Measure, write and print."""
    rows = [{"blocks": title, **measure(options, wrap)} for title, wrap in WRAPPERS.items()]
    print(write_report(options.output, REPORT, {**provenance("jax"), "layers": options.layers, "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
