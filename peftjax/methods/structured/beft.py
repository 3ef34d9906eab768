"""BEFT: train a bias of what a weight gives.

Paper: "BEFT: Bias-Efficient Fine-Tuning of Language Models", 2025, arXiv 2509.15974.

    y = x·W + c + t      c the module's own bias, if it has one

Trained: t, out numbers a weight, float32, 0 at first. Backward keeps nothing. It is added to the module's
bias; a module without one gets it as a bias of its own, which no weight can hold: that is not merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from peftjax.methods._options import TargetOptions
from peftjax.methods._targets import Target
from peftjax.methods._weights import Slots, of_weights
from peftjax.methods.structured._biased import MaybeBiased, maybe_biased
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform
from peftjax.weights.shifted import Shifted


@dataclass(frozen=True, kw_only=True)
class BeftOptions(TargetOptions):
    """Those of `beft`."""

    def find(self, caller: str, params: Any, *, one_way: bool = False, **ranks: Any) -> list[Target]:
        """Every weight that they ask for; raises as `find_targets`."""
        return maybe_biased(super().find(caller, params, one_way=one_way, **ranks), params)


@register(
    kind="adapter",
    paper="BEFT, 2025, arXiv 2509.15974",
    trains="out",
    backward_keeps="nothing",
    # Weights of modules that have a bias, which are those that are merged.
    conformance=Conformance(
        example={"targets": r"(?!layers_0).*(down|up|out|output|head|conv_\d|patch_conv)/kernel"}
    ),
)
@takes(BeftOptions)
def beft(options: BeftOptions) -> Transform:
    """Add a trained bias to what the targeted weights give (arXiv 2509.15974).

    Raises:
        PeftError: in `init` for targets that do not fit the parameters; in `merge` for a module without a
            bias.
    """
    return of_weights("beft", options, _start, _weight, bias=_bias, one_way=True)


def _start(key: Array, target: Target, base: Any) -> tuple[Slots, Slots]:
    return {"shift": jnp.zeros((*target.stack, target.layout.matrix[1]))}, {}


def _weight(target: Target, base: Any, slots: Mapping[str, Array], keys: Array | None) -> Any:
    assert isinstance(target, MaybeBiased)
    return base if target.biased else Shifted(base, slots["shift"], target.layout)


def _bias(bias: Array, slots: Mapping[str, Array], target: Target, base: Any) -> Array:
    return bias + slots["shift"]
