"""How long `adapt` traces beside the plain model and a LoRA by hand: `python -m experiments.tracing`.

Each row is a training step of 24 unrolled blocks that are wrapped as the row says; the times of the three are
medians of `rounds` traces taken in turn, with JAX's caches cleared before each.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj

LAYERS, WIDTH, INNER, HEADS, RANK = 24, 64, 256, 4, 8
SHAPES = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {
    "gate": (WIDTH, INNER),
    "up": (WIDTH, INNER),
    "down": (INNER, WIDTH),
}
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


def block(linear: Callable[[str, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """One layer of a decoder, whose products are `linear(name, x)`."""
    hidden = norm(x)
    q, k, v = (linear(name, hidden).reshape(*x.shape[:-1], HEADS, -1) for name in "qkv")
    x = x + linear("o", jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
    hidden = norm(x)
    return x + linear("down", jax.nn.silu(linear("gate", hidden)) * linear("up", hidden))


def plain_block(layer: Any, x: jax.Array) -> jax.Array:
    """The block on plain weights."""
    return block(lambda name, x: x @ layer[name]["kernel"], x)


def by_hand(layer: Any, factors: Any, x: jax.Array) -> jax.Array:
    """The block with a LoRA that is written into it."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        a, b = factors[name]["a"], factors[name]["b"]
        return x @ layer[name]["kernel"] + 2.0 * ((x @ a.T) @ b)

    return block(linear, x)


def trace_seconds(loss: Callable[[Any], jax.Array], trained: Any) -> float:
    """The time to trace a gradient from nothing."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(loss)).trace(trained)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    names = [f"layer_{n}" for n in range(LAYERS)]
    params = {n: {k: {"kernel": jnp.ones(s) / s[0]} for k, s in SHAPES.items()} for n in names}
    factors = {
        n: {k: {"a": jnp.ones((RANK, s[0])), "b": jnp.zeros((RANK, s[1]))} for k, s in SHAPES.items()}
        for n in names
    }
    method = pj.lora(rank=RANK, targets="all-linear")
    frozen, trainable = method.init(jax.random.key(0), params)
    x = jnp.ones((2, 16, WIDTH))
    print("| blocks | plain model, s | `adapt` / plain model | `adapt` / LoRA by hand |\n|---|---|---|---|")
    for title, wrap in WRAPPERS.items():
        plain, hand = wrap(plain_block), wrap(by_hand)

        def model(params: Any, x: jax.Array, plain: Any = plain) -> jax.Array:
            for name in names:
                x = plain(params[name], x)
            return x

        def loss_by_hand(factors: Any, hand: Any = hand) -> jax.Array:
            y = x
            for name in names:
                y = hand(params[name], factors[name], y)
            return y.sum()

        def loss_adapted(trainable: Any, model: Any = model) -> jax.Array:
            return pj.adapt(model)(method.apply(frozen, trainable), x).sum()

        def loss_plain(params: Any, model: Any = model) -> jax.Array:
            return model(params, x).sum()

        runs = [
            (
                trace_seconds(loss_plain, params),
                trace_seconds(loss_by_hand, factors),
                trace_seconds(loss_adapted, trainable),
            )
            for _ in range(rounds)
        ]
        first = statistics.median(plain for plain, _, _ in runs)
        to_plain = statistics.median(ours / plain for plain, _, ours in runs)
        to_hand = statistics.median(ours / hand for _, hand, ours in runs)
        print(f"| {title} | {first:.2f} | {to_plain:.1f} | {to_hand:.1f} |", flush=True)


if __name__ == "__main__":
    main()
