"""Plain selection: train some parameters as they are, freeze the rest.

    trainable = {path: parameter}        frozen = everything else

`unfreeze` names what is trained, `freeze` what is not; BitFit (Ben Zaken et al., ACL 2022, arXiv
2106.10199) trains the biases only, LayerNorm tuning (Zhao et al., "Tuning LayerNorm in Attention", ICLR 2024,
arXiv 2312.11420) the norms, `full` everything. The backward pass keeps what the gradient of each
trained parameter needs: for a bias nothing, for a kernel its input.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.core import naming, tree
from peftjax.core.errors import PeftError
from peftjax.core.targets import Targets, select
from peftjax.transform.frozen import Frozen, Trainable
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.base import Weight


@register(
    kind="selection",
    paper="plain selection of parameters",
    trains="the matched parameters",
    backward_keeps="the inputs of matched kernels",
    quantized_base=False,
    conformance=Conformance(example={"targets": r".*(head|norm|scale|bias).*"}),
)
def unfreeze(targets: Targets, *, exclude: Targets | None = None) -> Transform:
    """Train the matched parameters themselves.

    Args:
        targets: a regular expression over whole names, or a list of names or path suffixes; a module's
            name stands for every parameter in it, so `["classifier"]` is the classifier's kernel and
            bias (and never those of `my_classifier`).
        exclude: what to leave out, in the same forms; wins over `targets`.

    Raises:
        PeftError: in `init`, when nothing, or only part of a list, is matched, or a match is a
            structured weight.
    """
    return _selection("unfreeze", targets, exclude)


@register(
    kind="selection",
    paper="plain selection of parameters",
    trains="all but the matched parameters",
    backward_keeps="the inputs of trained kernels",
    quantized_base=False,
    conformance=Conformance(example={"targets": r".*bias"}),
)
def freeze(targets: Targets) -> Transform:
    """Train every floating-point parameter but the matched ones.

    Args:
        targets: the parameters that stay frozen, as in `unfreeze`.

    Raises:
        PeftError: in `init`, when the rest is empty, or has a structured weight.
    """
    return _selection("freeze", ".*", targets)


@register(
    kind="selection",
    paper="full fine-tuning",
    trains="everything",
    backward_keeps="every layer's input",
    quantized_base=False,
)
def full() -> Transform:
    """Train every floating-point parameter.

    Raises:
        PeftError: in `init`, when there is none, or one is a structured weight.
    """
    return _selection("full", ".*", None)


@register(
    kind="selection",
    paper="BitFit, Ben Zaken et al. 2022, arXiv 2106.10199",
    trains="the biases",
    backward_keeps="nothing for a linear layer",
)
def bitfit() -> Transform:
    """Train the biases (arXiv 2106.10199): every parameter called 'bias', or as Haiku calls them.

    Raises:
        PeftError: in `init`, when there is none, or one is a structured weight.
    """

    def find(params: Any) -> list[str]:
        found = tree.biases(params)
        if not found:
            raise PeftError("bitfit: target 'bias' matched no parameter, nor did 'b' or 'offset'")
        return found

    return _training("bitfit", find)


@register(
    kind="selection",
    paper="LayerNorm tuning, Zhao et al. 2024, arXiv 2312.11420",
    trains="scales and biases of norms",
    backward_keeps="the normalized inputs of norms",
)
def ln_tuning(targets: Targets | None = None, *, exclude: Targets | None = None) -> Transform:
    """Train the norms (arXiv 2312.11420): their scales and biases.

    Args:
        targets: which modules, as in `unfreeze`; by default all whose name has 'norm' in it or begins with
            'ln', and all others that have a 'scale' and no weight.
        exclude: what to leave out, in the same forms; wins over `targets`.

    Raises:
        PeftError: in `init`, when nothing, or only part of a list, is matched, or a match is a
            structured weight.
    """
    if targets is not None:
        return _selection("ln_tuning", targets, exclude)

    def find(params: Any) -> list[str]:
        norms = _norms(params)
        if not norms:
            raise PeftError("ln_tuning: target 'norm' matched no parameter; name the norms by targets")
        return select(
            params,
            ".*",
            caller="ln_tuning",
            exclude=exclude,
            eligible=lambda path, leaf: path in norms and _is_floating(path, leaf),
            names=naming.names_of_parameter,
        )

    return _training("ln_tuning", find)


def _norms(params: Any) -> set[str]:
    """The parameters of norms."""
    leaves = tree.named_leaves(params)
    weights = {tree.module_of(path) for path in leaves if path.rsplit("/", 1)[-1] in naming.WEIGHT_NAMES}
    scaled = {tree.module_of(path) for path in leaves if path.rsplit("/", 1)[-1] == "scale"} - weights
    return {path for path in leaves if (own := tree.module_of(path)) in scaled or naming.is_norm(own)}


def _selection(name: str, targets: Targets, exclude: Targets | None) -> Transform:
    def find(params: Any) -> list[str]:
        _say_complex(name, params)
        return select(
            params,
            targets,
            caller=name,
            exclude=exclude,
            eligible=_is_floating,
            names=naming.names_of_parameter,
        )

    return _training(name, find)


def _say_complex(name: str, params: Any) -> None:
    """Warn of complex weights, which no method trains: their gradients would have to be conjugated."""
    for path, leaf in tree.named_leaves(params).items():
        if tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            warnings.warn(f"{name}: {path!r} is {leaf.dtype} and stays frozen", stacklevel=4)


def _training(name: str, find: Callable[[Any], list[str]]) -> Transform:
    def init(key: Array, params: Any) -> tuple[Frozen, Trainable]:
        paths = find(params)
        leaves = tree.named_leaves(params)
        for path in paths:
            if isinstance(leaves[path], Weight):
                raise PeftError(
                    f"{name}: {path!r} is already a {type(leaves[path]).__name__}; exclude it here "
                    "or from the method before"
                )
        taken, rest = tree.partition(params, paths)
        return Frozen(rest), taken

    def apply(frozen: Frozen, trainable: Trainable, *, key: Array | None = None) -> Any:
        return tree.join(frozen.params, trainable)

    return Transform(name, {}, init, apply)


def _is_floating(path: str, leaf: Any) -> bool:
    return not isinstance(leaf, tree.Hole) and jnp.issubdtype(leaf.dtype, jnp.floating)
