"""What many tests share: trained-looking adapters, and the comparison with the merged model."""

import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import tree
from peftjax.testing.comparisons import assert_close
from peftjax.testing.model import KEY, moved

_PRODUCTS_AND_SUMS = ("dot_general", "conv_general_dilated", "add", "add_any", "mul", "scatter-add")


def all_but_slow(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """The names as parameters of a test, those that are not quick marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def quick_at(values: Iterable[Any], *places: int, every: int = 0) -> list[Any]:
    """The values as parameters of a test, slow but for those at the places, or for one of so many.

    A tuple has the values of several parameters.
    """
    found = list(values)
    quick = places or range(0, len(found), every)
    spread = [value if type(value) is tuple else (value,) for value in found]
    marks = [[] if n in quick else [pytest.mark.slow] for n in range(len(found))]
    return [pytest.param(*value, marks=mark) for value, mark in zip(spread, marks)]


def combined(*lists: Iterable[Any]) -> list[Any]:
    """All combinations as parameters of a test, quick where one at most is not the first of its list."""
    lists = tuple(map(tuple, lists))
    return [
        pytest.param(*(values[n] for values, n in zip(lists, places)), marks=marks)
        for places in itertools.product(*(range(len(values)) for values in lists))
        for marks in [[pytest.mark.slow] if sum(n > 0 for n in places) > 1 else []]
    ]


def example_of(name: str, **options: Any) -> pj.Transform:
    """The method with the options of its example; one that trains nothing goes beside a LoRA."""
    info = pj.METHODS[name]
    beneath = info.kind in ("companion", "rewrite")
    known = inspect.signature(info.factory).parameters
    own = {name: value for name, value in options.items() if name in known and info.kind != "companion"}
    method = info.factory(**info.conformance.example, **own)
    return pj.chain(method, pj.lora(rank=2, **options)) if beneath else method


def normal(key: jax.Array, shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
    """As `jax.random.normal`, without a program for each shape."""
    drawn = np.random.default_rng(np.asarray(jax.random.key_data(key))).standard_normal(shape)
    return jnp.array(drawn, dtype)


def noisy(trainable: Any, key: jax.Array = KEY, scale: float = 0.1) -> Any:
    """The trainable as after some steps: every number moved by its own random amount."""
    return moved(trainable, np.asarray(jax.random.key_data(key)), scale)


def assert_equals_merged(
    forward: Callable[..., Any],
    params: Any,
    method: pj.Transform,
    *inputs: Any,
    tolerance: float = 1e-5,
    trained: bool = True,
) -> None:
    """Outputs and gradients (adapter and float inputs) of the adapted model equal the merged one's."""
    frozen, trainable = method.init(KEY, params)
    frozen = replace(frozen, advanced=True)
    if trained:
        trainable = noisy(trainable)
    run = pj.adapt(forward)

    def adapted(trainable: Any, inputs: Any, frozen: Any) -> Any:
        return _summary(run(method.apply(frozen, trainable), *inputs))

    def merged(trainable: Any, inputs: Any, frozen: Any) -> Any:
        return _summary(forward(method.merge(frozen, trainable), *inputs))

    floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(inputs))
    grads = jax.value_and_grad(adapted, (0, 1) if floating else 0, has_aux=True)
    wanted = jax.value_and_grad(merged, (0, 1) if floating else 0, has_aux=True)
    got = jax.jit(grads)(trainable, inputs, frozen)
    want = jax.jit(wanted)(trainable, inputs, frozen)
    assert_close(got[0][1], want[0][1], tolerance)
    assert_close(got[1], want[1], tolerance)
    of_adapter = got[1][0] if floating else got[1]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(of_adapter)), "a gradient is all zero"


def _summary(out: Any) -> tuple[jax.Array, Any]:
    return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(out)), out


def made_shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of every product and sum in a jaxpr and in the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in (
            "dot_general",
            "conv_general_dilated",
            "add",
            "add_any",
            "mul",
            "scatter-add",
        ):
            yield from (variable.aval.shape for variable in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from made_shapes(inner)


def assert_no_dense_gradient(
    forward: Callable[..., Any], params: Any, method: pj.Transform, *inputs: Any
) -> None:
    """No product or sum of a training step has the shape of an adapted weight, or of one of a stack."""
    frozen, trainable = method.init(KEY, params)
    frozen, run = replace(frozen, advanced=True), pj.adapt(forward)

    def loss(trainable: Any) -> jax.Array:
        return _summary(run(method.apply(frozen, trainable), *inputs))[0]

    leaves = tree.named_leaves(method.apply(frozen, trainable))
    adapted = {leaf.shape for leaf in leaves.values() if isinstance(leaf, pj.Weight)}
    forbidden = adapted | {shape[1:] for shape in adapted if len(shape) > 2}
    made = set(made_shapes(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    assert adapted
    assert not forbidden & made
