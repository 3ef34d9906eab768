"""What run an output folder belongs to, so that no run continues another one's checkpoints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from peftjax.core.errors import PeftError
from peftjax.io.files import read_json, replacing
from peftjax.parallel.processes import is_first

FILE = "run.json"


def run_identity(method: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """A run's identity: its method's name and options (JSON-able), and its model's parameters.

    `model` is a SHA-256 over every parameter's path, shape and dtype; values do not matter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"method": dict(method), "model": digest}


def claim_folder(directory: Path, identity: Mapping[str, Any]) -> None:
    """Write the identity into `directory`, which the first process does, or compare it with what is there.

    Raises:
        PeftError: the folder belongs to another run: names the first difference.
    """
    path = directory / FILE
    if path.exists():
        old, new = _flat(read_json(path)), _flat(json.loads(json.dumps(identity)))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                there, here = (repr(values.get(name))[:200] for values in (old, new))
                raise PeftError(
                    f"{directory} belongs to another run: {name[:200]} is {there} there and {here} in this "
                    "run; choose another output folder"
                )
        return
    if not is_first():
        return
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested JSON objects as one level, keys joined by dots."""
    flat, left = {}, [("", tree)]
    while left:  # a damaged file may nest more deeply than functions can
        prefix, values = left.pop()
        for key, value in values.items():
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(value, dict):
                left.append((name, value))
            else:
                flat[name] = value
    return flat
