"""The methods that PEFT has too, other than LoRA, its kin, and prompts."""

from collections.abc import Mapping
from typing import Any

from peftjax.hf.forms.form import Form
from peftjax.hf.forms.lowrank import LOWRANK
from peftjax.hf.forms.selection import SELECTION
from peftjax.hf.forms.sparse import SPARSE
from peftjax.hf.forms.structured import STRUCTURED

FORMS = (*LOWRANK, *STRUCTURED, *SPARSE, *SELECTION)
BY_METHOD = {form.method: form for form in FORMS}


def form_of_config(config: Mapping[str, Any]) -> Form | None:
    """How the adapter of a configuration is written, where its type is one of the table."""
    forms = [form for form in FORMS if form.type == config.get("peft_type")]
    special = [form for form in forms if form.where and form.where.items() <= config.items()]
    return next(iter([*special, *(form for form in forms if not form.where)]), None)
