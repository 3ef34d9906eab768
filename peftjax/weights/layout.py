"""Which axes of a weight are stacked layers or experts, inputs, outputs: as given, or as its name tells.

A weight of any rank is read as a stack of matrices `[*stack, in, out]`: the canonical form, in which
adapters are stored. A `Layout` keeps, for every logical axis, its kind and its place in the canonical
form, and follows the views (transpose, reshape, slices of the stack) that a model takes of the weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from peftjax.core.errors import PeftError
from peftjax.core.naming import STACKS, is_convolution
from peftjax.core.shapes import match_sizes
from peftjax.core.targets import pattern_value
from peftjax.core.tree import Opaque, module_of

# "s" stack (layers, experts), "i" input (kernel window included), "o" output, "1" an added unit axis, "m"
# axes of several kinds in one.
Kind = Literal["s", "i", "o", "1", "m"]
Side = Literal["i", "o"]


@dataclass(frozen=True)
class Axis:
    """One logical axis: its kind, its place among the axes of that kind, its size."""

    kind: Kind
    place: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The logical axes of a weight and the name it has in the parameter tree.

    With `one_way` an activation may meet the inputs only: which side they are is a guess that the weight's
    method depends on, so that `x @ w.T` must be an error and not another method.
    """

    axes: tuple[Axis, ...]
    name: str = "weight"
    one_way: bool = False

    @classmethod
    def parse(cls, letters: str, shape: Sequence[int], name: str = "weight") -> "Layout":
        """Read one letter per axis, e.g. 'io' (a matrix), 'soi' (stacked, transposed), 'iio' (a 1-D
        convolution, window first).

        Raises:
            PeftError: the letters do not fit the shape, or name no input or no output.
        """
        if len(letters) != len(shape) or set(letters) - set("sio"):
            raise PeftError(
                f"{name}: layout {letters!r} does not fit shape {tuple(shape)}; "
                "give one letter of 's' (stack), 'i' (input), 'o' (output) per axis"
            )
        if not {"i", "o"} <= set(letters):
            raise PeftError(f"{name}: layout {letters!r} needs an input axis and an output axis")
        axes = tuple(
            Axis(cast(Kind, letter), letters[:position].count(letter), size)
            for position, (letter, size) in enumerate(zip(letters, shape))
        )
        return cls(axes, name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(axis.size for axis in self.axes)

    @property
    def letters(self) -> str:
        """One letter per logical axis; 'parse' reads it."""
        return "".join(axis.kind for axis in self.axes)

    def positions(self, kind: Kind) -> tuple[int, ...]:
        """The logical positions of the axes of a kind, in canonical order."""
        found = [(axis.place, position) for position, axis in enumerate(self.axes) if axis.kind == kind]
        return tuple(position for _, position in sorted(found))

    def sizes(self, kind: Kind) -> tuple[int, ...]:
        """The sizes of the axes of a kind, in canonical order."""
        return tuple(self.axes[position].size for position in self.positions(kind))

    @property
    def stack(self) -> tuple[int, ...]:
        """The canonical stack shape."""
        return self.sizes("s")

    @property
    def matrix(self) -> tuple[int, int]:
        """The canonical (in, out) sizes of one matrix of the stack."""
        return math.prod(self.sizes("i")), math.prod(self.sizes("o"))

    @property
    def canonical_order(self) -> tuple[int, ...]:
        """The permutation that brings the logical axes to `[*stack, *in, *out]`, unit axes first."""
        return sum((self.positions(kind) for kind in ("1", "s", "i", "o")), ())

    def transpose(self, permutation: Sequence[int]) -> "Layout":
        """The layout after `jnp.transpose(w, permutation)`."""
        return replace(self, axes=tuple(self.axes[position] for position in permutation))

    def drop(self, position: int) -> "Layout":
        """The layout without one stack or unit axis."""
        gone = self.axes[position]
        kept = self.axes[:position] + self.axes[position + 1 :]
        return replace(self, axes=_renumber_after(kept, gone.kind, gone.place, -1))

    def resized(self, sizes: Sequence[int]) -> "Layout":
        """The same axes with other sizes."""
        return replace(self, axes=tuple(replace(a, size=n) for a, n in zip(self.axes, sizes)))

    def with_stack(self, position: int, size: int, place: int = 0) -> "Layout":
        """The layout with one more stack axis, at a logical position and a canonical place."""
        axes = _renumber_after(self.axes, "s", place - 1, +1)
        return replace(self, axes=(*axes[:position], Axis("s", place, size), *axes[position:]))

    def reshape(self, shape: Sequence[int]) -> "Layout | None":
        """The layout after `jnp.reshape(w, shape)`.

        Axes of one kind may merge and split, unit axes may come and go; None when the new shape mixes
        kinds, breaks the canonical order, or merges or splits the stack.
        """
        groups = match_sizes(self.shape, tuple(shape))
        if groups is None:
            return None
        pieces: list[tuple[Kind, int, int, int]] = []  # kind, old place, order within it, size
        for old, new in groups:
            axes = [self.axes[position] for position in old]
            kinds = {axis.kind for axis in axes if axis.size > 1} or {axis.kind for axis in axes}
            if len(axes) == 0 or kinds == {"1"}:
                pieces += [("1", -1, 0, size) for size in new]
                continue
            if len(kinds) > 1 or (kinds == {"s"} and (len(axes), len(new)) != (1, 1)):
                return None
            places = [axis.place for axis in axes if axis.size > 1 or len(axes) == 1]
            if places != list(range(places[0], places[0] + len(places))):
                return None
            kind = kinds.pop()
            pieces += [(kind, places[0], order, size) for order, size in enumerate(new)]
        ranks: dict[str, list[tuple[int, int]]] = {}
        for kind, place, order, _ in pieces:
            ranks.setdefault(kind, []).append((place, order))
        units = iter(range(len(pieces)))
        axes = tuple(
            Axis(
                kind,
                next(units) if kind == "1" else sorted(ranks[kind]).index((place, order)),
                size,
            )
            for kind, place, order, size in pieces
        )
        if {axis.kind for axis in axes} >= {"i", "o"} and math.prod(self.stack) == math.prod(
            axis.size for axis in axes if axis.kind == "s"
        ):
            return replace(self, axes=axes)
        return None


def _renumber_after(axes: tuple[Axis, ...], kind: Kind, place: int, by: int) -> tuple[Axis, ...]:
    return tuple(
        replace(axis, place=axis.place + by) if axis.kind == kind and axis.place > place else axis
        for axis in axes
    )


# How parameters are named by the modules of Flax; the last component is the parameter's own name.
_ATTENTION_INPUTS = ("query", "key", "value", "qkv")
_ATTENTION_OUTPUTS = ("out",)


def _tells_its_layout(path: str) -> bool:
    """Whether a parameter's name is one whose axes are known by the conventions of Flax and Equinox."""
    return path.rsplit("/", 1)[-1] in ("kernel", "weight", "embedding", "embeddings")


def guess_layout(path: str, shape: Sequence[int], bias: Sequence[int] | None = None) -> str:
    """The layout letters of a parameter, from its name, its shape and the shape of its bias.

    Matrices are 'io' ('oi' when called 'weight', as in Equinox), convolutions end in input, output
    (begin with output, input when called 'weight'), attention kernels with heads are 'ioo' and 'iio',
    and every further leading axis is a stack. What a name does not tell must be given as `layouts`; a
    wrong guess is an error when the weight is first used, never a wrong result.
    """
    *modules, name = path.split("/")
    ndim = len(shape)
    parent = modules[-1].lower() if modules else ""
    # 'layers/3' and 'layers_3' are one layer: only a list without a number is stacked.
    stacked = any(
        module.lower() in STACKS and not inner.isdecimal()
        for module, inner in zip(modules, [*modules[1:], ""])
    )
    if name == "weight":
        return "oi" + "i" * (ndim - 2) if is_convolution(path, ndim) or ndim > 3 else "s" * (ndim - 2) + "oi"
    if name == "kernel" and is_convolution(path, ndim):
        return "s" * stacked + "i" * (ndim - 1 - stacked) + "o"
    if name == "kernel" and ndim > 2:
        with_heads = "i" + "oo", "ii" + "o"
        for letters, parents in zip(with_heads, (_ATTENTION_INPUTS, _ATTENTION_OUTPUTS)):
            outputs = letters.count("o")
            if parent not in parents or ndim not in (3, 4):
                continue
            if ndim == 4:
                return "s" + letters
            if tuple(bias or ()) == tuple(shape[-outputs:]) or (bias is None and not stacked):
                return letters
    return "s" * (ndim - 2) + "io"


def layout_of(
    path: str, leaves: Mapping[str, Any], layouts: Mapping[str, str] | None, *, one_way: bool = False
) -> Layout:
    """The layout of a weight: its own, the one given, or the one its name tells.

    Args:
        path: of the weight.
        leaves: all parameters by path.
        layouts: letters by pattern.
        one_way: whether the method depends on which side is the input: a guess that the name does not
            support is then held to.
    """
    leaf = leaves[path]
    if isinstance(leaf, Opaque) and isinstance(own := getattr(leaf, "layout", None), Layout):
        return own
    bias = leaves.get(f"{module_of(path)}/bias")
    guess = guess_layout(path, leaf.shape, getattr(bias, "shape", None))
    given = pattern_value(path, layouts, None)
    layout = Layout.parse(given or guess, leaf.shape, path)
    # The kernels of transposed convolutions have the same names, and outputs before inputs.
    told = _tells_its_layout(path) and not is_convolution(path, leaf.ndim)
    return replace(layout, one_way=one_way and given is None and not told)
