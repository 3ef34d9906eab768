"""Quantized bases of any format: whole numbers, floats of 4 and 8 bits, powers of two, sums of binaries.

    w ≈ scale_g · element(code)        affine:  w ≈ scale_g · (code - zero_g)        bcq:  w ≈ Σ_k ±scale_gk
    with `rotate`:  x·w = (x R)·(R w),  R = I ⊗ H / √b, of which R w is coded

The formats are those of `peftjax.quantize.formats`. It trains nothing and goes before a method, as `nf4`. A
layer decodes its weight for its product, forward and backward, and keeps the codes.

With `train` it is quantization-aware training with the straight-through estimator (Bengio et al. 2013, arXiv
1308.3432):

    y = x·r(w),  r(w) = decode(encode(w))        dw = dr where w is within its codes' reach, else 0

The formats `statsq4`, `statsq3`, `statsq2` are for that (OFQ, Liu et al., ICML 2023, arXiv 2302.02210), and
so is `anneal`, which then moves no weight but those that are close to two codes.
"""

from dataclasses import dataclass, replace
from typing import get_args

from peftjax.core.checks import at_least, one_of, positive
from peftjax.core.errors import PeftError
from peftjax.methods.quantization._base import BaseOptions, quantized_base, rounded_base
from peftjax.quantize.binary_sums import BinarySum
from peftjax.quantize.elements import Integers, Natural
from peftjax.quantize.formats import FORMATS, FormatName
from peftjax.quantize.groups import Format
from peftjax.quantize.scales import ScaleForm
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """How a method codes weights that can do so in any format.

    Attributes:
        format: one of `peftjax.quantize.formats`.
        group: how many weights along the inputs share a scale, -1 for all inputs of an output; by default the
            format's.
        scales: what the scales are kept as; by default the format's.
        affine: whether a group has a zero point, which whole numbers alone can have.
        search: how many ranges are tried for each group, from its whole one down to 0.3 of it, for the least
            squared error; 1 takes the whole one. By default 20 for int3 and int2, else 1.
        rounds: how often the scales and the signs of bcq1 ... bcq4 are fitted in turn; by default 20.
    """

    format: FormatName = "int4"
    group: int | None = None
    scales: ScaleForm | None = None
    affine: bool = False
    search: int | None = None
    rounds: int | None = None

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        one_of(caller, "format", self.format, get_args(FormatName))
        if self.group not in (None, -1):
            positive(caller, "group", self.group)
        if self.scales is not None:
            one_of(caller, "scales", self.scales, get_args(ScaleForm))
        positive(caller, "search", self.search)
        at_least(caller, "rounds", self.rounds, 0)
        element = FORMATS[self.format].element
        if self.rounds is not None and not isinstance(element, BinarySum):
            raise PeftError(f"{caller}: rounds is of bcq1 ... bcq4; {self.format} is not fitted in turns")
        if isinstance(element, BinarySum) and self.search not in (None, 1):
            raise PeftError(f"{caller}: {self.format} tries no ranges; set rounds, and leave search out")
        if self.affine and not isinstance(element, Integers):
            raise PeftError(f"{caller}: affine is of int2 ... int8; {self.format} has no zero point")

    @property
    def form(self) -> Format:
        """How weights are coded."""
        form = FORMATS[self.format]
        if self.search is not None:
            form = replace(form, search=self.search)
        if self.rounds is not None:
            form = replace(form, element=BinarySum(form.element.bits, self.rounds))
        if self.affine:
            form = replace(form, element=Natural(form.element.bits))
        if self.group is not None:
            form = replace(form, group=None if self.group == -1 else self.group)
        return form if self.scales is None else replace(form, scales=self.scales)


@dataclass(frozen=True, kw_only=True)
class Nf4CodeOptions(CodeOptions):
    """The same, by default QLoRA's: NF4 with double quantization.

    Attributes:
        format: one of `peftjax.quantize.formats`.
        scales: what the scales are kept as; None for the format's.
    """

    format: FormatName = "nf4"
    scales: ScaleForm | None = "double"


@dataclass(frozen=True, kw_only=True)
class FormatOptions(CodeOptions, BaseOptions):
    """What a method takes that codes weights in any format."""


@dataclass(frozen=True, kw_only=True)
class QuantizedOptions(FormatOptions):
    """What `quantized` takes.

    Attributes:
        train: train the weights, of which a step sees what they are rounded to.
        anneal: of the trained weights, a step moves those alone that are no further from the middle of two
            codes than this share of the scale; the others stay bit for bit. OFQ's last epochs have 0.005.
        rotate: code `R w` instead of w, R being the Hadamard rotation of the inputs, and multiply with x R:
            what is large in a few inputs is spread over all, so that no group's range is one number's.
    """

    train: bool = False
    anneal: float | None = None
    rotate: bool = False

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        super().require_valid(caller)
        positive(caller, "anneal", self.anneal)
        if self.anneal is not None and not self.train:
            raise PeftError(f"{caller}: anneal is of weights that are trained; give train=True too")
        if self.rotate and self.train:
            raise PeftError(f"{caller}: rotate is of weights that stay as they are; leave train out")
        if self.anneal is not None and isinstance(self.form.element, BinarySum):
            raise PeftError(
                f"{caller}: anneal is of formats with one scale for a weight; {self.format} has several"
            )


@register(
    kind="rewrite",
    paper="round-to-nearest bases: int8 ... int2, float8, MXFP4, NVFP4, powers of two, StatsQ, binaries",
    trains="nothing; with `train` the weights, rounded in every step",
    backward_keeps="the codes, 2 to 8 bits a weight; with `train` x and the weights",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={"format": "int4", "group": 4}, starts_as_base=False),
)
@takes(QuantizedOptions)
def quantized(options: QuantizedOptions) -> Transform:
    """Keep the targeted weights as codes of a format, rounded to the nearest.

    With `train`, targets that are arrays are trained, and every forward pass rounds them. A target that an
    earlier method has adapted is rounded with its adapter: `pj.chain(pj.lora(), pj.quantized(train=True))`
    trains a LoRA for the base that it will be merged into. `merge` gives what the forward pass has seen, and
    `peftjax.weights.rounded.with_codes(method.apply(frozen, trainable))` the same model as codes.

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> frozen, _ = pj.quantized(format="int8").init(jax.random.key(0), params)
        >>> frozen.params["up"]["kernel"].codes.codes.dtype.name
        'int8'
    """
    if options.train:
        return rounded_base("quantized", options.form, options, anneal=options.anneal)
    return quantized_base("quantized", replace(options.form, rotate=options.rotate), options)
