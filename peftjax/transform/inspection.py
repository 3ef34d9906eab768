"""What a method makes of each parameter of a model, from shapes alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from peftjax.core import naming, tree
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight


def inspection(method: Transform, params: Any) -> dict[str, Any]:
    """Each parameter with what the method makes of it, and the totals; nothing is computed."""
    frozen, trainable = _shapes(method.init, jax.random.key(0), params)
    rewritten = _rewritten(method, frozen, trainable)
    kept = tree.named_leaves(frozen.params)
    rows, left = [], left_out(params, frozen, rewritten)
    for path, leaf in tree.named_leaves(params).items():
        weight = rewritten[path]
        if not tree.is_array(leaf):
            continue
        row = {"parameter": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype), "becomes": "frozen"}
        if path in left:
            row["why"] = left[path]
        if isinstance(kept[path], tree.Hole):
            row["becomes"] = "trained"
        elif isinstance(weight, Weight):
            row |= {"becomes": type(weight).__name__, "axes": weight.layout.letters}
        rows.append(row)
    for path, leaf in rewritten.items():
        if path not in kept:
            shape, dtype = list(leaf.shape), str(leaf.dtype)
            rows.append({"parameter": path, "shape": shape, "dtype": dtype, "becomes": "added"})
    return {
        "method": method.name,
        "parameters": rows,
        "trainable_parameters": tree.count(trainable),
        "total_parameters": tree.count(params),
    }


def _rewritten(method: Transform, frozen: Frozen, trainable: Trainable) -> dict[str, Any]:
    """The leaves of what `apply` gives, by path; also of a method that has not advanced."""
    return tree.named_leaves(_shapes(method.apply, replace(frozen, advanced=True), trainable))


def _shapes(fn: Callable[..., Any], *args: Any) -> Any:
    """The shapes of what `fn` gives, where functions and other leaves that are no arrays pass as they are."""
    leaves, structure = jax.tree.flatten(args)
    arrays = {n: leaf for n, leaf in enumerate(leaves) if tree.is_array(leaf)}
    fixed: list[Any] = []

    def of_arrays(arrays: dict[int, Any]) -> list[Any]:
        whole = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        out, out_structure = jax.tree.flatten(fn(*jax.tree.unflatten(structure, whole)))
        fixed[:] = [out_structure, [None if tree.is_array(leaf) else leaf for leaf in out]]
        return [leaf for leaf in out if tree.is_array(leaf)]

    shapes = iter(jax.eval_shape(of_arrays, arrays))
    return jax.tree.unflatten(fixed[0], [next(shapes) if leaf is None else leaf for leaf in fixed[1]])


def left_out(params: Any, frozen: Frozen, rewritten: Mapping[str, Any]) -> dict[str, str]:
    """Every matrix that a method neither adapts nor trains, with the reason.

    Args:
        params: the parameters.
        frozen: from the method's `init`.
        rewritten: the leaves of what its `apply` gives, by path.
    """
    leaves, kept = tree.named_leaves(params), tree.named_leaves(frozen.params)
    others, found = tree.not_parameters(params), {}
    for path, leaf in leaves.items():
        if getattr(leaf, "ndim", 0) < 2 or isinstance(kept[path], tree.Hole):
            continue
        if isinstance(rewritten[path], Weight) and not isinstance(leaf, Weight):
            continue
        if path in others:
            found[path] = others[path]
        elif not naming.is_weight(path, leaf, leaves):
            found[path] = "vectors of stacked layers"
        else:
            found[path] = naming.why_not_linear(path, leaf) or "the targets do not name it"
    return found


def adapted_line(method: Transform, params: Any, frozen: Frozen, trainable: Trainable) -> str:
    """How many weights a method adapts, and which matrices it leaves out for which reason, in one line."""
    rewritten = _rewritten(method, frozen, trainable)
    before = tree.named_leaves(params)
    adapted = sum(isinstance(rewritten[p], Weight) and not isinstance(w, Weight) for p, w in before.items())
    groups: dict[str, list[str]] = {}
    for path, why in left_out(params, frozen, rewritten).items():
        groups.setdefault(why, []).append(path)
    said = "; ".join(f"{_some(paths)}: {why}" for why, paths in groups.items())
    return f"weights adapted: {adapted}" + (f"; matrices left as they are: {said}" if said else "")


def _some(paths: Sequence[str], most: int = 5) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
