"""Entries that all weights compete for: those with the largest scores of the whole model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from peftjax.core import tree
from peftjax.core.checks import positive_share
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets
from peftjax.methods._entries import entry_count, random_entries
from peftjax.methods._targets import key_for
from peftjax.methods.sparse._added_entries import Chosen, put_added, started, with_entries
from peftjax.methods.sparse._in_place import find_weights, in_the_base
from peftjax.transform.frozen import Frozen, Params, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.canonical import to_canonical
from peftjax.weights.indexing import NOWHERE
from peftjax.weights.layout import Layout


@dataclass(frozen=True, kw_only=True)
class EntryOptions:
    """What the methods take that train entries of the whole model.

    Attributes:
        density: the share of all entries of the targets that is trained.
        counts: of a saved adapter, how many entries a matrix of each weight has at most, by path. Without
            scores the entries are drawn at random, and those of a saved adapter read from its file.
        targets: as in `lora`.
        exclude: what to leave out, in the same forms; wins over `targets`.
        layouts: axes by pattern.
        in_place: the base may hold the adapted weights; see `Transform.close`.
    """

    density: float = 0.01
    counts: Mapping[str, int] | None = None
    targets: Targets = "all-linear"
    exclude: Targets | None = None
    layouts: Mapping[str, str] | None = None
    in_place: bool = False

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        positive_share(caller, "density", self.density)

    def find(self, caller: str, params: Params) -> dict[str, Layout]:
        """The layout of every weight that they ask for, by path."""
        return find_weights(
            params,
            caller=caller,
            targets=self.targets,
            exclude=self.exclude,
            layouts=self.layouts,
            in_place=self.in_place,
        )


def of_largest(name: str, options: EntryOptions, scores: Any) -> Transform:
    """The method that trains the entries with the largest |score| over all targets together.

    Args:
        name: the method's name.
        options: of it.
        scores: arrays of the targets' shapes, in a tree like the parameters or by path; None for an adapter
            whose entries are read from its file.

    Raises:
        PeftError: here, and in `init`, for targets or scores that do not fit.
    """
    chosen = None if scores is None else largest_of_all(name, options, scores)
    config: dict[str, Any] = {"counts": options.counts}
    if chosen is not None:
        config["counts"] = {path: entries[0].shape[-1] for path, (_, entries) in chosen.items()}

    def init(key: Array, params: Params) -> tuple[Frozen, Trainable]:
        found = options.find(name, params)
        if chosen is not None:
            _require_same(name, {path: layout for path, (layout, _) in chosen.items()}, found)
            return started(params, chosen, in_place=options.in_place)
        counts = {path: entry_count(name, path, found[path], 0, options.density) for path in found}
        if options.counts is not None:
            _require_same(name, options.counts, found)
            counts = dict(options.counts)
        drawn = {
            path: (found[path], random_entries(key_for(key, path), found[path], count))
            for path, count in counts.items()
        }
        return started(params, drawn, in_place=options.in_place)

    placement = in_the_base(put_added) if options.in_place else None
    return Transform(name, config, init, with_entries, placement=placement)


def largest_of_all(caller: str, options: EntryOptions, scores: Any) -> dict[str, tuple[Layout, Chosen]]:
    """Exactly `density` of all entries, by path; of equal scores the earlier. A weight may have none.

    The matrices of a stack are filled up with none to the largest number.
    """
    leaves = tree.named_leaves(scores)
    found = options.find(caller, scores)
    sizes = {
        path: np.abs(np.asarray(jax.device_get(to_canonical(leaves[path], layout)), np.float32))
        for path, layout in found.items()
    }
    flat = np.concatenate([size.reshape(-1) for size in sizes.values()])
    if not np.isfinite(flat).all():
        raise PeftError(f"{caller}: a score is not finite; look at the training or the data that it is of")
    count = max(1, round(options.density * flat.size))
    cut = np.partition(flat, flat.size - count)[flat.size - count]
    taken = flat > cut
    taken[np.flatnonzero(flat == cut)[: count - taken.sum()]] = True
    ends = np.cumsum([size.size for size in sizes.values()])[:-1]
    chosen = {}
    for (path, layout), part in zip(found.items(), np.split(taken, ends)):
        if part.any():
            chosen[path] = (layout, _entries(part.reshape(-1, *layout.matrix), layout))
    return chosen


def _entries(taken: np.ndarray, layout: Layout) -> Chosen:
    """The entries of matrices `[S, in, out]`."""
    of_each = [np.nonzero(one) for one in taken]
    most = max(len(rows) for rows, _ in of_each)
    rows = np.full((len(of_each), most), NOWHERE, np.int32)
    columns = np.zeros((len(of_each), most), np.int32)
    for number, (own_rows, own_columns) in enumerate(of_each):
        rows[number, : len(own_rows)], columns[number, : len(own_rows)] = own_rows, own_columns
    shape = (*layout.stack, most)
    return rows.reshape(shape), columns.reshape(shape)


def _require_same(caller: str, wanted: Mapping[str, Any], found: Mapping[str, Layout]) -> None:
    for path, layout in wanted.items():
        if path not in found or (isinstance(layout, Layout) and layout.shape != found[path].shape):
            raise PeftError(
                f"{caller}: these parameters have no weight {path!r}, or one of another "
                "shape; give scores of this model"
            )
