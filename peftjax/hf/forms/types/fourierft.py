"""PEFT's files of FOURIERFT."""

from __future__ import annotations

from dataclasses import dataclass

from peftjax.hf.forms.fields import Count, Seed
from peftjax.hf.forms.form import Form, same


@dataclass(frozen=True)
class _Fourierft:
    n_frequency: Count = 1000
    n_frequency_pattern: dict[str, Count] | None = None
    scaling: float = 150.0
    random_loc_seed: Seed = 777
    fan_in_fan_out: bool = False
    init_weights: bool = False


FOURIERFT = Form(
    "fourierft",
    "FOURIERFT",
    {"spectrum": same("fourierft_spectrum")},
    _Fourierft,
    lambda options: {"scaling": options["scale"], "random_loc_seed": options["seed"]},
    lambda fields: {"scale": fields.scaling, "seed": fields.random_loc_seed},
    bias="fourier_only",
    of_arrays=lambda arrays: {"count": len(arrays["spectrum"])},
    patterned={"count": ("n_frequency", "n_frequency_pattern")},
)
