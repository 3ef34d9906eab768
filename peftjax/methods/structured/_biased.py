"""Whether the module of a target has a bias."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftjax.core import tree
from peftjax.methods._targets import Target


@dataclass(frozen=True, kw_only=True)
class MaybeBiased(Target):
    """A target whose module has a bias, or has not."""

    biased: bool


def maybe_biased(targets: Sequence[Target], params: Any) -> list[Target]:
    """The targets, with what the parameters have beside each."""
    biased = {tree.module_of(path) for path in tree.biases(params)}
    return [MaybeBiased(**vars(own), biased=tree.module_of(own.path) in biased) for own in targets]
