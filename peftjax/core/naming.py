"""What the names of parameters say about them, as Flax, Equinox and Haiku name them."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

# Module names under which models keep their output layer: 'all-linear' leaves it alone.
OUTPUT_LAYERS = ("head", "heads", "lm_head", "classifier", "score", "logits", "output_layer")
# Parameters of a module that multiply an activation, as Flax, Equinox and Haiku name them.
WEIGHT_NAMES = ("kernel", "weight", "w", "embedding", "embeddings")
# Names under which layers or experts are stacked along a leading axis.
STACKS = ("blocks", "layers", "experts", "scan")
VECTOR_NAMES = ("bias", "scale", "b", "sinks")
# What chooses a token's experts: 'all-linear' leaves it alone.
ROUTERS = ("router",)
EXPERTS = "experts"


def is_weight(path: str, leaf: Any, leaves: Mapping[str, Any] | None = None) -> bool:
    """Whether the leaf can be a matrix to adapt: floating, two axes or more, no bias or scale.

    Given the other `leaves` of the tree, a matrix called 'b' or 'scale' is told from stacked vectors.
    """
    if getattr(leaf, "ndim", 0) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    if leaves is None:
        return path.rsplit("/", 1)[-1] not in VECTOR_NAMES
    return not is_vector(path, leaf, leaves)


def is_vector(path: str, leaf: Any, leaves: Mapping[str, Any]) -> bool:
    """Whether the leaf is a bias or scale, or several of them stacked."""
    *modules, name = path.split("/")
    if name == "bias" or name not in VECTOR_NAMES:
        return name == "bias"
    of_weights = [leaves.get("/".join((*modules, other))) for other in WEIGHT_NAMES]
    if of_weights := [weight.ndim for weight in of_weights if hasattr(weight, "ndim")]:
        return leaf.ndim < max(of_weights)
    norm = is_norm("/".join(modules))
    inner = zip(modules, [*modules[1:], ""])
    return norm or leaf.ndim < 2 or any(m.lower() in STACKS and not n.isdecimal() for m, n in inner)


def is_norm(module: str) -> bool:
    """Whether a module is called a norm, such as 'layer_norm' or 'ln_1'."""
    return re.search(r"norm|^ln", module.rsplit("/", 1)[-1].lower()) is not None


def is_convolution(path: str, ndim: int) -> bool:
    """Whether the weight's module is called a convolution, and it has the axes of one."""
    module = path.split("/")[-2] if "/" in path else ""
    # 'conv_in', 'PatchConv', 'dwconv2d', but not 'converter', 'conversation', 'convex'.
    called = re.search(r"conv(?!ers|ert|erg|ey|ex|inc|ention|oy)", module.lower())
    return called is not None and ndim > 2


def is_embedding(path: str) -> bool:
    """Whether the parameter is a lookup table."""
    return path.rsplit("/", 1)[-1] in ("embedding", "embeddings")


def why_not_linear(path: str, leaf: Any) -> str | None:
    """Why 'all-linear' leaves a weight out, such as a lookup table, a router or a head; else None."""
    if is_embedding(path):
        return "a lookup table"
    if is_convolution(path, leaf.ndim):
        return "a convolution"
    if not {*ROUTERS}.isdisjoint(path.split("/")[:-1]):
        return "a router"
    if (called := _output_layer(path)) is not None:
        return f"in the output layer {called!r}"
    return None


def is_of_experts(path: str) -> bool:
    """Whether the parameter is one of experts."""
    return EXPERTS in path.split("/")


def _output_layer(path: str) -> str | None:
    """The output layer that a parameter lies in: never inside a numbered or stacked layer or an attention."""
    *modules, name = path.split("/")
    parts = [part for part in (*modules, name) if part != "params"]
    for number, part in enumerate(parts):
        if re.fullmatch(r"\d+|.*_\d+", part) or part.lower() in STACKS or "att" in part.lower():
            return None
        # A list of heads further in is that of an attention.
        if part in OUTPUT_LAYERS and (part != "heads" or number == 0):
            return part
    return None


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


def names_of_weight(path: str) -> tuple[str, ...]:
    """The names under which a weight may be asked for: its own and, for a 'kernel', its module's."""
    module, _, name = path.rpartition("/")
    return (path, module) if module and name in WEIGHT_NAMES else (path,)


def names_of_parameter(path: str) -> tuple[str, ...]:
    """The names under which a plain parameter may be asked for: its own and every module above."""
    parts = path.split("/")
    return tuple("/".join(parts[:n]) for n in range(len(parts), 0, -1))
