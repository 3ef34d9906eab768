"""What is trained as an addition to chosen entries of weights: the start, the weights, and their place."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from peftjax.core import tree
from peftjax.methods.sparse._in_place import Place, Plan, Slots
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.weights.indexing import put_entries, take_entries
from peftjax.weights.layout import Layout
from peftjax.weights.sparse_entries import SparseEntries

Chosen = tuple[Array | np.ndarray, Array | np.ndarray]
"""Entries (row, column) `[*stack, K]` int32."""


def started(
    params: Params, chosen: Mapping[str, tuple[Layout, Chosen]], *, in_place: bool
) -> tuple[Frozen, Trainable]:
    """Values of zero at the entries (rows, columns) `[*stack, K]` of each weight, by path."""
    leaves, places, state, trainable = tree.named_leaves(params), [], {}, {}
    for path, (layout, entries) in chosen.items():
        rows, columns = map(jnp.asarray, entries)
        places.append(Place(path, layout, rows.shape[-1]))
        state[path] = {"rows": rows, "columns": columns}
        if in_place:
            state[path]["original"] = take_entries(leaves[path], rows, columns, layout)
        trainable[path] = {"values": jnp.zeros(rows.shape, jnp.float32)}
    return Frozen(params, state, Plan(tuple(places))), trainable


def with_entries(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Params:
    """The parameters with the values added, which the base may hold already."""
    leaves, weights = tree.named_leaves(frozen.params), {}
    for place in frozen.plan.places:
        kept, values = frozen.state[place.path], trainable[place.path]["values"]
        weights[place.path] = SparseEntries(
            leaves[place.path],
            values,
            kept["rows"],
            kept["columns"],
            place.layout,
            added=True,
            in_place=frozen.plan.closed,
        )
    return tree.replace(frozen.params, weights)


def put_added(w: Array, place: Place, kept: Slots, trained: Slots | None) -> Array:
    """The array with its original entries plus the trained values; for None, with the original ones."""
    values: Any = kept["original"]
    if trained is not None:
        values = values.astype(jnp.float32) + trained["values"]
    return put_entries(w, kept["rows"], kept["columns"], values, place.layout)
