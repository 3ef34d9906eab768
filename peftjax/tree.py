"""Names, selection and surgery of parameter trees: any pytree of arrays, named by '/'-joined paths."""

import collections
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.errors import PeftError

Targets = str | Sequence[str]
T = TypeVar("T")

# Module names under which models keep their output layer: 'all-linear' leaves it alone.
OUTPUT_LAYERS = ("head", "heads", "lm_head", "classifier", "score", "logits", "output_layer")
# Parameters of a module that multiply an activation, in the words of Flax, Equinox and Haiku.
WEIGHT_NAMES = ("kernel", "weight", "w", "embedding", "embeddings")
_VECTOR_NAMES = ("bias", "scale", "b")


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
    return "~" not in parts and (len(parts) > 1 or parts[-1] in (*WEIGHT_NAMES, *_VECTOR_NAMES))


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
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """How many bytes the arrays of `tree` take."""
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


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


def is_weight(path: str, leaf: Any) -> bool:
    """Whether the leaf can be a matrix to adapt: floating, two axes or more, no bias or scale."""
    return (
        getattr(leaf, "ndim", 0) >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and path.rsplit("/", 1)[-1] not in _VECTOR_NAMES
    )


def names_of_weight(path: str) -> tuple[str, ...]:
    """The names under which a weight may be asked for: its own and, for a 'kernel', its module's."""
    module, _, name = path.rpartition("/")
    return (path, module) if module and name in WEIGHT_NAMES else (path,)


def names_of_parameter(path: str) -> tuple[str, ...]:
    """The names under which a plain parameter may be asked for: its own and every module above."""
    parts = path.split("/")
    return tuple("/".join(parts[:n]) for n in range(len(parts), 0, -1))


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("/" + suffix)


def _is_linear(path: str) -> bool:
    *modules, name = path.split("/")
    if name in ("embedding", "embeddings"):
        return False
    conv = bool(modules) and "conv" in modules[-1].lower()
    return not conv and not any(module in OUTPUT_LAYERS for module in (*modules, name))


def _matches(path: str, names: tuple[str, ...], targets: Targets) -> bool:
    if targets == "all-linear":
        return _is_linear(path)
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(_has_suffix(name, part) for name in names for part in targets)


def layer_index(path: str, layers_pattern: str | None = None) -> int | None:
    """The number of the layer that a path lies in, or None outside a list of layers.

    The first component that is a number ('layers/3/...') or ends in one ('layers_3/...') counts, so an
    expert's number further in is not taken for a layer's; `layers_pattern` names the list instead.
    """
    parts = path.split("/")
    for list_name, part in zip(["", *parts], parts, strict=False):
        if part.isdecimal():
            name, number = list_name, part
        elif match := re.fullmatch(r"(.*?)_(\d+)", part):
            name, number = match.groups()
        else:
            continue
        if layers_pattern is None or name == layers_pattern:
            return int(number)
    return None


def select(
    tree: Any,
    targets: Targets,
    *,
    who: str,
    exclude: Targets | None = None,
    eligible: Callable[[str, Any], bool] = is_weight,
    names: Callable[[str], tuple[str, ...]] = names_of_weight,
) -> list[str]:
    """The paths of the leaves that `targets` asks for, in tree order.

    Args:
        tree: parameters, structured leaves included.
        targets: a regular expression that must match a whole name; or a list of exact names or path
            suffixes (whole components: 'head' is not 'my_head'); or 'all-linear': every linear layer
            but the output layer (`OUTPUT_LAYERS`), convolutions and embeddings.
        who: the method that asks, for the errors.
        exclude: the same two forms; wins over `targets`.
        eligible: which leaves may be hit at all.
        names: the names under which a leaf may be asked for.

    Raises:
        PeftError: nothing matched, a part of a list matched nothing, everything was excluded, or the
            exclusion took nothing away.
    """
    candidates = {path: names(path) for path, leaf in named_leaves(tree).items() if eligible(path, leaf)}
    if not candidates:
        raise PeftError(f"{who}: the tree has no parameter this method can adapt")
    known = list(dict.fromkeys(name for all_names in candidates.values() for name in all_names))
    hits = [path for path, all_names in candidates.items() if _matches(path, all_names, targets)]
    if not isinstance(targets, str):
        for part in targets:
            if not any(_has_suffix(name, part) for name in known):
                raise PeftError(
                    f"{who}: target {part!r} matched no parameter; closest: {nearest(part, known)}"
                )
    if not hits:
        raise PeftError(
            f"{who}: pattern {targets!r} matched no parameter; closest: {nearest(str(targets), known)}"
        )
    if exclude is None:
        return hits
    kept = [path for path in hits if not _matches(path, candidates[path], exclude)]
    if not kept:
        raise PeftError(f"{who}: exclude {exclude!r} removes every parameter that {targets!r} matched")
    if len(kept) == len(hits):
        raise PeftError(
            f"{who}: exclude {exclude!r} matched none of the targets; closest: "
            f"{nearest(str(exclude), [name for path in hits for name in candidates[path]])}"
        )
    return kept


def pattern_value(path: str, patterns: Mapping[str, T] | None, default: T) -> T:
    """The value of the first key that matches the end of the weight's name; '^' anchors at its start."""
    for key, value in (patterns or {}).items():
        if any(re.match(rf"(.*/)?({key})$", name) for name in names_of_weight(path)):
            return value
    return default


def require_patterns_used(who: str, patterns: Mapping[str, Any] | None, paths: Sequence[str]) -> None:
    """Raise a PeftError that names the first key of a rank or alpha pattern which matches no target."""
    for key in patterns or {}:
        if not any(pattern_value(path, {key: True}, False) for path in paths):
            known = [name for path in paths for name in names_of_weight(path)]
            raise PeftError(f"{who}: pattern {key!r} matched no target; closest: {nearest(key, known)}")


def _require_known(paths: Iterable[str], known: Mapping[str, Any]) -> None:
    for path in paths:
        if path not in known:
            raise PeftError(f"no parameter is called {path!r}; closest: {nearest(path, known)}")
