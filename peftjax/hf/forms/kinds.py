"""How PEFT writes the arrays of a module that is no linear layer: a convolution, or a lookup table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from peftjax.core.errors import PeftError
from peftjax.hf.forms.form import Form, SlotForm, SlotForms
from peftjax.models.weight_map import TensorEntry
from peftjax.weights.layout import Layout


@dataclass(frozen=True)
class Kernel:
    """The inputs of a convolution.

    Attributes:
        channels: how many.
        window: its sizes.
        channels_first: whether they come before the window here, as they do in PyTorch.
    """

    channels: int
    window: tuple[int, ...]
    channels_first: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those of PyTorch."""
        return self.channels, *self.window

    def written(self, v: np.ndarray) -> np.ndarray:
        """`[..., n]` as `[..., channels, *window]`."""
        lead = v.shape[:-1]
        if self.channels_first:
            return v.reshape(*lead, *self.sizes)
        return np.moveaxis(v.reshape(*lead, *self.window, self.channels), -1, len(lead))

    def read(self, v: np.ndarray, lead: int) -> np.ndarray:
        """The inverse, of what has so many axes before those of the inputs."""
        v = v.reshape(*v.shape[:lead], *self.sizes)
        v = v if self.channels_first else np.moveaxis(v, lead, -1)
        return v.reshape(*v.shape[:lead], -1)


def flat_inputs(*slots: str) -> Callable[[SlotForms, Kernel], SlotForms]:
    """That of arrays `[r, in]` which PEFT writes of a convolution as of a linear layer."""

    def of_convolution(forms: SlotForms, kernel: Kernel) -> SlotForms:
        n = math.prod(kernel.sizes)

        def flat(form: SlotForm) -> SlotForm:
            def write(v: np.ndarray) -> np.ndarray:
                return form.write(kernel.written(v).reshape(-1, n))

            return replace(form, write=write, read=lambda v: kernel.read(form.read(v), 1))

        return {slot: flat(form) if slot in slots else form for slot, form in forms.items()}

    return of_convolution


def pointwise(forms: SlotForms, kernel: Kernel) -> SlotForms:
    """That of a method of blocks of inputs, which are other ones here than in PEFT where there is a window.

    The arrays are those of a linear layer.

    Raises:
        PeftError: there is one.
    """
    if any(size > 1 for size in kernel.window):
        raise PeftError(
            f"blocks of the {math.prod(kernel.sizes)} inputs of a convolution are cut across a window of "
            f"{' x '.join(map(str, kernel.window))} otherwise in PEFT, and only windows of 1 are exchanged: "
            "merge it"
        )
    return forms


def forms_of(form: Form, slots: SlotForms, weight: TensorEntry, layout: Layout, name: str) -> SlotForms:
    """The forms of a module's arrays.

    Raises:
        PeftError: it is of a kind that the form has not.
    """
    if weight.kind == "linear":
        return slots
    if weight.kind not in form.kinds or weight.groups > 1:
        grouped = " with groups" if weight.groups > 1 else ""
        raise PeftError(
            f"{weight.path!r} is {name!r}, a weight of kind {weight.kind!r}{grouped}; {form.type} is "
            f"exchanged with PEFT for {' and '.join(('linear', *form.kinds))} layers: leave it out, or merge"
        )
    sizes = layout.sizes("i")
    channels, *window = (sizes[-1], *sizes[:-1]) if weight.transpose else sizes
    return form.kinds[weight.kind](slots, Kernel(channels, tuple(window), not weight.transpose))


def names_in_file(form: Form, slots: SlotForms) -> list[str]:
    """What PEFT calls a module's arrays, of any kind."""
    kinds = [of_kind(slots, Kernel(1, (1, 1), True)) for of_kind in form.kinds.values()]
    return sorted({slot.name for own in (slots, *kinds) for slot in own.values()})
