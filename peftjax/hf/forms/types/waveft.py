"""PEFT's files of WAVEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftjax.core.errors import PeftError
from peftjax.hf.forms.fields import Count, Seed
from peftjax.hf.forms.form import Form, same


@dataclass(frozen=True)
class _Waveft:
    n_frequency: Count = 2592
    n_frequency_pattern: dict[str, Count] | None = None
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: Seed = 777
    proportional_parameters: bool = False
    fan_in_fan_out: bool = False
    init_weights: bool = True


def _waveft_options(fields: _Waveft) -> dict[str, Any]:
    if fields.use_idwt and fields.wavelet_family != "db1":
        raise PeftError(
            f"the file is of WaveFT with the wavelets {fields.wavelet_family!r}, and peftjax has Haar's, "
            "'db1'; train it with those, or merge it in PEFT"
        )
    return {
        "scale": fields.scaling,
        "seed": fields.random_loc_seed,
        "transform": fields.use_idwt,
    }


WAVEFT = Form(
    "waveft",
    "WAVEFT",
    {"spectrum": same("waveft_spectrum")},
    _Waveft,
    lambda options: {
        "scaling": options["scale"],
        "random_loc_seed": options["seed"],
        "use_idwt": options["transform"],
    },
    _waveft_options,
    bias="waveft_only",
    of_arrays=lambda arrays: {"count": len(arrays["spectrum"])},
    patterned={"count": ("n_frequency", "n_frequency_pattern")},
)
