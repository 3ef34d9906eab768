"""Which parameters a user means: patterns, names or 'all-linear', and errors that name the nearest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from peftjax.core.errors import PeftError
from peftjax.core.naming import is_of_experts, is_weight, names_of_weight, why_not_linear
from peftjax.core.patterns import fullmatches, match
from peftjax.core.tree import Hole, named_leaves, nearest, not_parameters

Targets = str | Sequence[str]
T = TypeVar("T")


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("/" + suffix)


def _matches(path: str, names: tuple[str, ...], targets: Targets, leaf: Any) -> bool:
    if targets == "all-linear":
        return why_not_linear(path, leaf) is None
    if isinstance(targets, str):
        return any(fullmatches(targets, name) for name in names)
    return any(_has_suffix(name, part) for name in names for part in targets)


def select(
    tree: Any,
    targets: Targets,
    *,
    caller: str,
    exclude: Targets | None = None,
    eligible: Callable[[str, Any], bool] | None = None,
    names: Callable[[str], tuple[str, ...]] = names_of_weight,
) -> list[str]:
    """The paths of the leaves that `targets` asks for, in tree order.

    Args:
        tree: parameters, structured leaves included.
        targets: a regular expression that must match a whole name; or a list of exact names or path
            suffixes (whole components: 'head' is not 'my_head'); or 'all-linear': every linear layer
            but the output layer (`OUTPUT_LAYERS`, outside layers), routers, convolutions and embeddings.
        caller: the method that asks, for the errors.
        exclude: the same two forms; wins over `targets`.
        eligible: which parameters may be hit at all; by default matrices.
        names: the names under which a leaf may be asked for.

    Raises:
        PeftError: nothing matched, a part of a list matched nothing, everything was excluded, or the
            exclusion took nothing away.
    """
    leaves, others = named_leaves(tree), not_parameters(tree)
    eligible = eligible or (lambda path, leaf: is_weight(path, leaf, leaves))
    candidates = {
        path: names(path) for path, leaf in leaves.items() if path not in others and eligible(path, leaf)
    }
    rest = {path: names(path) for path in leaves if path not in candidates}
    if not candidates:
        raise PeftError(
            f"{caller}: the tree has no parameter this method can adapt{_why(leaves, list(leaves), others)}"
        )
    known = list(dict.fromkeys(name for all_names in candidates.values() for name in all_names))
    hits = [
        path for path, all_names in candidates.items() if _matches(path, all_names, targets, leaves[path])
    ]
    if not isinstance(targets, str):
        for part in targets:
            if not any(_has_suffix(name, part) for name in known):
                unfit = [path for path, own in rest.items() if any(_has_suffix(name, part) for name in own)]
                if unfit:
                    raise PeftError(
                        f"{caller}: target {part!r} has nothing to adapt{_why(leaves, unfit, others)}"
                    )
                raise PeftError(
                    f"{caller}: target {part!r} matched no parameter; closest: {nearest(part, known)}"
                )
    if not hits:
        unfit = [
            path
            for path, own in rest.items()
            if targets != "all-linear" and _matches(path, own, targets, leaves[path])
        ]
        if unfit:
            raise PeftError(
                f"{caller}: pattern {targets!r} has nothing to adapt{_why(leaves, unfit, others)}"
            )
        raise PeftError(
            f"{caller}: pattern {targets!r} matched no parameter; closest: {nearest(str(targets), known)}"
        )
    if exclude is None:
        return hits
    kept = [path for path in hits if not _matches(path, candidates[path], exclude, leaves[path])]
    if not kept:
        raise PeftError(f"{caller}: exclude {exclude!r} removes every parameter that {targets!r} matched")
    if len(kept) == len(hits):
        raise PeftError(
            f"{caller}: exclude {exclude!r} matched none of the targets; closest: "
            f"{nearest(str(exclude), [name for path in hits for name in candidates[path]])}"
        )
    return kept


def _why(leaves: Mapping[str, Any], paths: Sequence[str], others: Mapping[str, str]) -> str:
    """`: 'path' ..., the reason` of the first leaf that is no parameter or does not fit the method."""
    for path in sorted(paths, key=lambda path: path not in others):
        leaf = leaves[path]
        if isinstance(leaf, Hole):
            return f": {path!r} is trained as it is by the method before"
        if path in others:
            return f": {path!r} cannot be trained, {others[path]}"
        return f": {path!r} is {leaf.dtype} of shape {tuple(leaf.shape)}, not what the method adapts"
    return ""


def require_experts_named(caller: str, targets: Targets, paths: Sequence[str]) -> None:
    """Raise a PeftError where 'all-linear' alone would train something for every expert of a model."""
    experts = [path for path in paths if is_of_experts(path)]
    if targets == "all-linear" and experts:
        raise PeftError(
            f"{caller}: 'all-linear' does not tell what becomes of the experts, such as {experts[0]!r}: "
            "leave them out (exclude='.*experts.*'), or name them (targets='.*(attention|experts).*'), "
            "and each gets parameters of its own"
        )


def pattern_value(path: str, patterns: Mapping[str, T] | None, default: T) -> T:
    """The value of the first key that matches the end of the weight's name; '^' anchors at its start."""
    for key, value in (patterns or {}).items():
        if any(match(key, name, before="(.*/)?(", after=")$") for name in names_of_weight(path)):
            return value
    return default


def require_patterns_used(caller: str, patterns: Mapping[str, Any] | None, paths: Sequence[str]) -> None:
    """Raise a PeftError that names the first key of a rank or alpha pattern which matches no target."""
    for key in patterns or {}:
        if not any(pattern_value(path, {key: True}, False) for path in paths):
            known = [name for path in paths for name in names_of_weight(path)]
            raise PeftError(f"{caller}: pattern {key!r} matched no target; closest: {nearest(key, known)}")
