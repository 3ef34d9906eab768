"""The arrays of a structured weight that all matrices of its stack share, apart from those of each."""

from dataclasses import fields, replace
from typing import Any, TypeVar

from peftjax.weights.views import Views

W = TypeVar("W", bound=Views)


def shares(w: Views) -> bool:
    """Whether a part of a weight belongs to all members of its stack."""
    parts = [(getattr(w, f.name), f.metadata["role"]) for f in fields(w)]
    return any(
        (role == "shared" and part is not None) or (isinstance(part, Views) and shares(part))
        for part, role in parts
    )


def mapped_axes(w: Views) -> Any:
    """The `in_axes` for a `vmap` over the first axis: None for arrays that all members share."""
    if not shares(w):
        return 0
    changes: dict[str, Any] = {}
    for f in fields(w):
        part, role = getattr(w, f.name), f.metadata["role"]
        if role != "static" and part is not None:
            axes = mapped_axes(part) if isinstance(part, Views) else 0
            changes[f.name] = None if role == "shared" else axes
    return replace(w, **changes)


def shared_alone(w: W) -> W:
    """The arrays that all members share, and None in the place of every other part."""
    changes: dict[str, Any] = {}
    for f in fields(w):
        part = getattr(w, f.name)
        if f.metadata["role"] not in ("static", "shared"):
            changes[f.name] = shared_alone(part) if isinstance(part, Views) else None
    return replace(w, **changes)


def with_shared_of(w: W, other: W | None) -> W:
    """A weight with the shared arrays of another of its structure; None leaves it without."""
    changes: dict[str, Any] = {}
    for f in fields(w):
        part = getattr(w, f.name)
        if f.metadata["role"] == "shared":
            changes[f.name] = None if other is None else getattr(other, f.name)
        elif isinstance(part, Views):
            changes[f.name] = with_shared_of(part, None if other is None else getattr(other, f.name))
    return replace(w, **changes)
