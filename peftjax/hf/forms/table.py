"""The methods that PEFT has too, other than LoRA, its kin, and prompts."""

from peftjax.hf.forms.lowrank import LOWRANK
from peftjax.hf.forms.structured import STRUCTURED

FORMS = (*LOWRANK, *STRUCTURED)
BY_METHOD = {form.method: form for form in FORMS}
BY_TYPE = {form.type: form for form in FORMS}
