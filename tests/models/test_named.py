"""Names of models are configurations with the published number of parameters."""

import pytest
from support import quick_at

from peftjax.core import tree
from peftjax.models.families import family_of
from peftjax.models.load import build_model
from peftjax.models.named import named_config, named_models

MILLIONS = {
    "bert-base": 108.891648,
    "bert-large": 334.092288,
    "gemma-2-9b": 9241.705984,
    "llama-2-7b": 6738.415616,
    "llama-3-70b": 70553.706496,
    "llama-3-8b": 8030.261248,
    "llama-3.1-70b": 70553.706496,
    "llama-3.1-8b": 8030.261248,
    "mistral-7b": 7241.732096,
    "mixtral-8x7b": 46702.792704,
    "qwen2.5-7b": 7615.616512,
    "qwen3-30b-a3b": 30532.122624,
    "qwen3-32b": 32762.123264,
    "qwen3-8b": 8190.735360,
    "roberta-large": 354.310144,
    "vit-b": 85.798656,
    "vit-h": 630.764800,
    "vit-l": 303.301632,
}
"""As the repositories' weights have them, but for the pooler of an encoder."""


def test_every_name_is_counted():
    assert sorted(MILLIONS) == named_models()


@pytest.mark.parametrize("name", quick_at(MILLIONS, every=5))
def test_the_parameters_are_those_published(name):
    config = named_config(name)
    family = family_of(config, name)
    head = "causal_lm" if "causal_lm" in family.heads else "none"
    model = build_model(family, family.read_config(config), head)
    assert tree.count(model.shapes) / 1e6 == pytest.approx(MILLIONS[name], abs=1e-6)
    assert "/" in config["_name_or_path"]
