"""A weight as codes, made of an array or of one layer after the other."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from peftjax.core.naming import is_embedding
from peftjax.quantize.groups import Format
from peftjax.weights.layout import Layout, Side
from peftjax.weights.quantized import Quantized, quantize

BLOCK_NUMBERS = 2**21
"""How many numbers of an array on one device are coded at a time: 8 MiB of float32, several times."""


@dataclass(frozen=True)
class Coding:
    """How a weight is coded.

    Attributes:
        layout: of its axes; the rows of a lookup table are coded each for itself.
        format: how.
    """

    layout: Layout
    format: Format

    def __call__(self, w: Array) -> Quantized:
        """The codes of an array, placed or traced, on the devices on which it lies."""
        return coded_weight(w, self.layout, self.format)

    @property
    def by_layer(self) -> bool:
        """Whether a layer may be coded after the other: the first axis is the first one of the stack."""
        return self.layout.positions("s")[:1] == (0,)

    def of_layers(self, layers: Iterable[Array], sharding: Sharding | None = None) -> Quantized:
        """The codes of a stack, of which a layer at a time is there.

        Args:
            layers: arrays `[1, *rest]`.
            sharding: of the whole array; None where the layers lie.
        """
        one = replace(self, layout=self.layout.resized((1, *self.layout.shape[1:])))
        codes = stacked(map(one, layers), self.layout, sharding)
        assert codes is not None
        return codes


def coded_weight(w: Array, layout: Layout, form: Format, *, rows: Side | None = None) -> Quantized:
    """A weight as codes, on the devices on which it lies.

    Args:
        w: the array, placed or traced.
        layout: of its axes; the rows of a lookup table are coded each for itself.
        form: how.
        rows: which side the rows of the codes are, where not that of `rows_of`.
    """
    rows = rows or rows_of(layout)
    sharding = None if isinstance(w, jax.core.Tracer) else getattr(w, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _encoded(w, layout, form, rows)
    encode = partial(quantize, layout=layout, form=form, rows=rows)
    shapes = jax.eval_shape(encode, w)
    return jax.jit(encode, out_shardings=code_shardings(shapes, sharding))(w)


def rows_of(layout: Layout) -> Side:
    """The side that the rows of the codes are: of a lookup table its inputs."""
    return "i" if is_embedding(layout.name) else "o"


def stacked(
    layers: Iterable[Quantized], layout: Layout, sharding: Sharding | None = None
) -> Quantized | None:
    """One weight of its layers, each freed before the next is made; None if there is none.

    Args:
        layers: of a stack of one, all of one format.
        layout: of the whole, with the layers along its first axis.
        sharding: of the whole array; None where the layers lie.
    """
    whole, store = None, _store
    for n, layer in enumerate(layers):
        if whole is None:
            whole, store = _empty(layer, layout, sharding)
        whole = replace(whole, codes=store(whole.codes, layer.codes, n))
        jax.block_until_ready(whole)
    return whole


def code_shardings(shapes: Quantized, of_weight: NamedSharding) -> Any:
    """Where codes and scales go beside the devices of their weight; whole where they do not divide."""
    specs = shapes.part_specs(of_weight.spec)

    def place(leaf: Any, spec: PartitionSpec) -> NamedSharding:
        mesh = of_weight.mesh
        parts = []
        for size, axes in zip(leaf.shape, (*spec, *(None,) * leaf.ndim)):
            names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            count = math.prod(mesh.shape[one] for one in names)
            parts.append(axes if size % count == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*parts))

    if specs is None:
        return jax.tree.map(lambda leaf: place(leaf, PartitionSpec()), shapes)
    own = jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [place(leaf, spec) for leaf, spec in zip(leaves, own, strict=True)])


@partial(jax.jit, static_argnames=("layout", "form", "rows"))
def _encoded(w: Array, layout: Layout, form: Format, rows: Side) -> Quantized:
    return quantize(w, layout, form, rows=rows, block=BLOCK_NUMBERS)


def _put(whole: Any, layer: Any, n: Any) -> Any:
    return jax.tree.map(lambda into, one: lax.dynamic_update_slice_in_dim(into, one, n, 0), whole, layer)


_store = jax.jit(_put, donate_argnums=0)


def _empty(
    layer: Quantized, layout: Layout, sharding: Sharding | None
) -> tuple[Quantized, Callable[[Any, Any, Any], Any]]:
    """The codes of no layer yet, and what puts one into them."""
    whole = replace(layer, layout=layout)
    shapes = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((layout.shape[0], *part.shape[1:]), part.dtype), whole
    )
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes), _store
    places = code_shardings(shapes, sharding)
    made = jax.tree.map(lambda part, place: jnp.zeros(part.shape, part.dtype, device=place), shapes, places)
    return made, jax.jit(_put, donate_argnums=0, out_shardings=places.codes)
