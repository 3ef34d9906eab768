"""Names and surgery of parameter trees: any pytree of arrays, named by '/'-joined paths."""

import collections
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core.errors import PeftError
from peftjax.core.naming import (
    VECTOR_NAMES,
    WEIGHT_NAMES,
    is_vector,
)

# What Flax keeps beside its 'params': nothing there is trained by a gradient.
_STATE_COLLECTIONS = ("batch_stats", "cache", "intermediates", "perturbations", "losses", "metrics")


class Opaque:
    """Base of every node that the functions of this file treat as one leaf."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Hole(Opaque):
    """What `partition` leaves in place of a leaf that it took out."""


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Opaque)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _is_variable(node: Any) -> bool:
    # Told by its class, so that Flax need not be installed.
    return any(
        kind.__name__ == "Variable" and kind.__module__.startswith("flax.nnx") for kind in type(node).__mro__
    )


def _variables(tree: Any) -> dict[tuple[Any, ...], Any]:
    """The NNX variables of a tree by the pytree keys that lead to them."""
    outer, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: _is_leaf(n) or _is_variable(n))
    return {tuple(keys): node for keys, node in outer if _is_variable(node)}


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """The names and leaves of a tree, and its structure.

    Raises:
        PeftError: two leaves have one name.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    values = [tuple(keys) for keys, _ in pairs if len(keys) > 1 and _key_name(keys[-1]) == "value"]
    variables = _variables(tree) if values else {}
    width = collections.Counter(tuple(keys[:-1]) for keys, _ in pairs) if values else {}
    own = {
        keys for keys in values if keys[:-1] in variables or (width[keys[:-1]] == 1 and _is_slot(keys[-2:]))
    }
    seen: dict[str, tuple[Any, ...]] = {}
    for full, _ in pairs:
        keys = tuple(full)
        name = "/".join(_key_name(key) for key in (keys[:-1] if keys in own else keys))
        if name in seen:
            raise PeftError(
                f"two leaves of the tree are called {name!r}: {jax.tree_util.keystr(seen[name])} and "
                f"{jax.tree_util.keystr(keys)}; rename one, so that each can be told by its path"
            )
        seen[name] = keys
    return list(seen), [leaf for _, leaf in pairs], structure


def _is_slot(keys: Sequence[Any]) -> bool:
    """Whether the keys are those of the slot of a trainable, `{path: {"value": array}}`.

    Its path has several parts or ends in the name of a parameter, below which no parameter lies.
    """
    owner, last = keys
    if not all(isinstance(key, jax.tree_util.DictKey) for key in keys) or last.key != "value":
        return False
    parts = str(owner.key).split("/")
    return "~" not in parts and (len(parts) > 1 or parts[-1] in (*WEIGHT_NAMES, *VECTOR_NAMES))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf of `tree` by its path name, in tree order; structured weights count as leaves.

    A name is the pytree keys joined by '/', without the '.value' of an NNX variable and without the slot
    'value' in which a trainable holds a parameter that is trained as it is.

    Raises:
        PeftError: two leaves have one name.
    """
    names, leaves, _ = _flatten(tree)
    return dict(zip(names, leaves, strict=True))


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """`tree` with each leaf replaced by `fn(path name, leaf)`."""
    names, leaves, structure = _flatten(tree)
    return jax.tree.unflatten(structure, [fn(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def is_array(leaf: Any) -> bool:
    """Whether the leaf is an array, its shape, or a structured weight: what a step can be given."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, np.generic)


def not_parameters(tree: Any) -> dict[str, str]:
    """The leaves that no method may train, with the reason; holes are not among them.

    A parameter is an array of real floating-point numbers. None are: a function, a Python number, an NNX
    variable of another type than `nnx.Param` (batch statistics, caches, counters), Flax's collections beside
    'params', and the start of an Equinox state.
    """
    names, leaves, _ = _flatten(tree)
    keys = list(keys_of(tree).values())
    variables = {at: type(node) for at, node in _variables(tree).items()}
    collections_of_flax = isinstance(tree, Mapping) and "params" in tree
    found = {}
    for name, leaf, path in zip(names, leaves, keys, strict=True):
        if isinstance(leaf, Hole):
            continue
        kind = next((variables[path[:n]] for n in range(len(path) + 1) if path[:n] in variables), None)
        top = _key_name(path[0]) if path else ""
        if not is_array(leaf):
            found[name] = f"it is no array but a {type(leaf).__name__}"
        elif kind is not None and not any(base.__name__ == "Param" for base in kind.__mro__):
            found[name] = f"it is a {kind.__name__} of NNX and no Param"
        elif collections_of_flax and top in _STATE_COLLECTIONS:
            found[name] = f"it lies in the collection {top!r} and not in 'params'"
        elif any(getattr(key, "name", "").endswith("state_index") for key in path):
            found[name] = "it is the start of a state of Equinox"
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            found[name] = f"it is {leaf.dtype}, and methods train real floating-point numbers"
    return found


def keys_of(tree: Any) -> dict[str, tuple[Any, ...]]:
    """The pytree keys of every leaf by its path name."""
    names, _, _ = _flatten(tree)
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return {name: tuple(keys) for name, (keys, _) in zip(names, pairs, strict=True)}


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with the named leaves exchanged.

    Raises:
        PeftError: a name is not in the tree.
    """
    _require_known(leaves, named_leaves(tree))
    return map_named(lambda path, leaf: leaves.get(path, leaf), tree)


def partition(tree: Any, paths: Iterable[str]) -> tuple[dict[str, Any], Any]:
    """Take the named leaves out: `(taken, rest)` with a `Hole` where each was; `join` undoes it."""
    leaves = named_leaves(tree)
    paths = list(paths)
    _require_known(paths, leaves)
    return {path: leaves[path] for path in paths}, replace(tree, dict.fromkeys(paths, Hole()))


def join(rest: Any, taken: Mapping[str, Any]) -> Any:
    """Put leaves back into the holes that `partition` made; holes of others may stay open.

    Raises:
        PeftError: a name is not a hole of `rest`.
    """
    leaves = named_leaves(rest)
    _require_known(taken, leaves)
    for path in taken:
        if not isinstance(leaves[path], Hole):
            raise PeftError(f"parameter {path!r} was not taken out of this tree")
    return replace(rest, taken)


def count(tree: Any) -> int:
    """How many numbers the arrays of `tree` hold."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree) if is_array(leaf))


def nbytes(tree: Any) -> int:
    """How many bytes the arrays of `tree` take."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if is_array(leaf))
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in arrays)


def nearest(name: str, known: Iterable[str], how_many: int = 3) -> str:
    """The known names most like `name`, quoted and joined, for an error message."""
    known = list(known)
    tails = {path.rsplit("/", 1)[-1]: path for path in known} | {path: path for path in known}
    close = difflib.get_close_matches(name, list(tails), n=how_many, cutoff=0.3)
    found = list(dict.fromkeys(tails[match] for match in close)) or known[:how_many]
    return ", ".join(repr(path) for path in found[:how_many])


def module_of(path: str) -> str:
    """The path of the module that owns the parameter: everything before the last '/'."""
    return path.rpartition("/")[0]


def biases(tree: Any) -> list[str]:
    """The paths of the biases, in the words of Flax and Equinox ('bias') and of Haiku ('b', 'offset')."""
    leaves, others = named_leaves(tree), not_parameters(tree)

    def is_bias(path: str, leaf: Any) -> bool:
        *modules, name = path.split("/")
        if "bias" in (*modules, name):
            return True
        if name == "offset":
            return "/".join((*modules, "scale")) in leaves
        return name == "b" and hasattr(leaf, "ndim") and (leaf.ndim < 2 or is_vector(path, leaf, leaves))

    return [path for path, leaf in leaves.items() if path not in others and is_bias(path, leaf)]


def _require_known(paths: Iterable[str], known: Mapping[str, Any]) -> None:
    for path in paths:
        if path not in known:
            raise PeftError(f"no parameter is called {path!r}; closest: {nearest(path, known)}")
