"""The methods that PEFT has too, other than LoRA, its kin, and prompts."""

from collections.abc import Mapping
from typing import Any

from peftjax.hf.forms.form import Form
from peftjax.hf.forms.types.adalora import ADALORA
from peftjax.hf.forms.types.adamss import ADAMSS
from peftjax.hf.forms.types.alora import ALORA
from peftjax.hf.forms.types.bdlora import BDLORA
from peftjax.hf.forms.types.beft import BEFT
from peftjax.hf.forms.types.boft import BOFT
from peftjax.hf.forms.types.bone import BONE
from peftjax.hf.forms.types.c3a import C3A
from peftjax.hf.forms.types.deft import DEFT
from peftjax.hf.forms.types.delora import DELORA
from peftjax.hf.forms.types.fourierft import FOURIERFT
from peftjax.hf.forms.types.frod import FROD
from peftjax.hf.forms.types.glora import GLORA
from peftjax.hf.forms.types.gralora import GRALORA
from peftjax.hf.forms.types.hira import HIRA
from peftjax.hf.forms.types.hra import HRA
from peftjax.hf.forms.types.ia3 import IA3
from peftjax.hf.forms.types.kasa import KASA
from peftjax.hf.forms.types.lily import LILY
from peftjax.hf.forms.types.ln_tuning import LN_TUNING
from peftjax.hf.forms.types.loha import LOHA
from peftjax.hf.forms.types.lokr import LOKR
from peftjax.hf.forms.types.mica import MICA
from peftjax.hf.forms.types.miss import MISS
from peftjax.hf.forms.types.monteclora import MONTECLORA
from peftjax.hf.forms.types.oft import OFT
from peftjax.hf.forms.types.osf import OSF
from peftjax.hf.forms.types.peanut import PEANUT
from peftjax.hf.forms.types.pvera import PVERA
from peftjax.hf.forms.types.randlora import RANDLORA
from peftjax.hf.forms.types.road import ROAD
from peftjax.hf.forms.types.supertuning import SUPERTUNING
from peftjax.hf.forms.types.tinylora import TINYLORA
from peftjax.hf.forms.types.unilora import UNILORA
from peftjax.hf.forms.types.vblora import VBLORA
from peftjax.hf.forms.types.velora import VELORA
from peftjax.hf.forms.types.vera import VERA
from peftjax.hf.forms.types.waveft import WAVEFT

FORMS = (
    ADALORA,
    ADAMSS,
    ALORA,
    BDLORA,
    BEFT,
    BOFT,
    BONE,
    C3A,
    DEFT,
    DELORA,
    FOURIERFT,
    FROD,
    GLORA,
    GRALORA,
    HIRA,
    HRA,
    IA3,
    KASA,
    LILY,
    LN_TUNING,
    LOHA,
    LOKR,
    MICA,
    MISS,
    MONTECLORA,
    OFT,
    OSF,
    PEANUT,
    PVERA,
    RANDLORA,
    ROAD,
    SUPERTUNING,
    TINYLORA,
    UNILORA,
    VBLORA,
    VELORA,
    VERA,
    WAVEFT,
)
BY_METHOD = {form.method: form for form in FORMS}


def form_of_config(config: Mapping[str, Any]) -> Form | None:
    """How the adapter of a configuration is written, where its type is one of the table."""
    forms = [form for form in FORMS if form.type == config.get("peft_type")]
    special = [form for form in forms if form.where and form.where.items() <= config.items()]
    special += [form for form in forms if form.variant and config.get(form.variant)]
    plain = [form for form in forms if not form.where and not form.variant]
    return next(iter([*special, *plain]), None)
