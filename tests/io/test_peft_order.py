"""The order of the modules of a class, by which PEFT numbers arrays, is that of the class itself."""

import numpy as np
import pytest

import peftjax as pj
from peftjax.core.errors import PeftError
from peftjax.hf.forms.order import in_order
from peftjax.hf.names import names_of

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
OPT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}
CLASSES = {
    "LlamaForCausalLM": ("LlamaConfig", DECODER),
    "MistralForCausalLM": ("MistralConfig", DECODER),
    "Qwen2ForCausalLM": ("Qwen2Config", {**DECODER, "head_dim": None}),
    "Qwen3ForCausalLM": ("Qwen3Config", DECODER),
    "Gemma2ForCausalLM": ("Gemma2Config", DECODER),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "BertForSequenceClassification": ("BertConfig", {**ENCODER, "vocab_size": 50}),
    "RobertaForSequenceClassification": ("RobertaConfig", {**ENCODER, "vocab_size": 50}),
    "ViTForImageClassification": ("ViTConfig", {**ENCODER, "image_size": 16, "patch_size": 8}),
    "OPTForCausalLM": ("OPTConfig", {**OPT, "num_attention_heads": 4}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_order_is_that_of_the_class(name, tmp_path):
    config, options = CLASSES[name]
    options = {key: value for key, value in options.items() if value is not None}
    theirs = getattr(transformers, name)(getattr(transformers, config)(**options))
    theirs.save_pretrained(tmp_path)
    model, params = pj.load(
        tmp_path, head="causal_lm" if name.endswith(("LM", "LMHeadModel")) else "classifier"
    )
    names = names_of(model, params)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    wanted = [module for module, held in theirs.named_modules() if isinstance(held, kinds)]
    ours = {names.written(key).removesuffix(".weight"): key for key in names.slots if key.endswith(".weight")}
    wanted = [module for module in wanted if module in ours]
    shuffled = np.random.default_rng(0).permutation(wanted).tolist()
    if name.startswith("OPT"):
        with pytest.raises(PeftError, match="in the order of the modules of OPTForCausalLM, which"):
            in_order(names, [ours[module] for module in shuffled])
        return
    assert len(wanted) > 6
    assert in_order(names, [ours[module] for module in shuffled]) == [ours[module] for module in wanted]
