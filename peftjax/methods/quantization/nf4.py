"""NF4: the base's weights as 4-bit NormalFloat codes, the ground of QLoRA.

Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314.

    w ≈ scale_g · table[code]       groups of 64 weights along the inputs, scale_g = max |w| of the group
    scale_g ≈ map[byte] · block + mean        "double": blocks of 256 scales, one mean for a matrix

4.127 bits a parameter (4.5 without double quantization). It trains nothing and goes before a method:
`pj.chain(pj.nf4(), pj.lora())` is QLoRA. A layer decodes its weight for its product, forward and backward,
and keeps the codes. Codes and scales are those of bitsandbytes.
"""

from dataclasses import dataclass, replace
from typing import Literal

from peftjax.core.checks import one_of, positive
from peftjax.methods.quantization._base import BaseOptions, quantized_base
from peftjax.quantize.formats import FORMATS
from peftjax.transform.options import takes
from peftjax.transform.registry import Conformance, register
from peftjax.transform.transform import Transform

_SCALES = {"none": "float32", "dynamic": "double", "float8": "double_float8"}


@dataclass(frozen=True, kw_only=True)
class Nf4Options(BaseOptions):
    """Options of `nf4`.

    Attributes:
        group: how many weights share a scale.
        double: how the scales are quantized: by the 8-bit dynamic map, as the released code does, by float8,
            as the paper says, or not.
        rotate: code the weights with their inputs rotated, as in `quantized`.
    """

    group: int = 64
    double: Literal["dynamic", "float8", "none"] = "dynamic"
    rotate: bool = False

    def require_valid(self, caller: str) -> None:
        """Raise a PeftError for an option out of range."""
        positive(caller, "group", self.group)
        one_of(caller, "double", self.double, tuple(_SCALES))


@register(
    kind="rewrite",
    paper="QLoRA's base, Dettmers et al. 2023, arXiv 2305.14314",
    trains="nothing",
    backward_keeps="the codes, 4.127 bits a weight",
    quantized_base=False,
    replaces_base=True,
    conformance=Conformance(example={}, starts_as_base=False),
)
@takes(Nf4Options)
def nf4(options: Nf4Options) -> Transform:
    """Keep the targeted weights as NF4 codes (arXiv 2305.14314).

    Raises:
        PeftError: here for an option out of range; in `init` for targets that do not fit the parameters.

    Examples:
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> method = pj.chain(pj.nf4(), pj.lora(rank=2))
        >>> frozen, trainable = method.init(jax.random.key(0), params)
        >>> frozen.params["up"]["kernel"].codes.codes.shape
        (8, 32)
    """
    form = replace(FORMATS["nf4"], group=options.group, scales=_SCALES[options.double], rotate=options.rotate)
    return quantized_base("nf4", form, options)
