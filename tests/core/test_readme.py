"""The README's examples run as they stand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax.models.decoder import decoder
from peftjax.models.llama import read_config

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def example(words):
    """The one example with these words in it."""
    (found,) = [text for text in EXAMPLES if words in text]
    return found


def test_the_example_learns():
    names: dict = {}
    exec(EXAMPLES[0], names)
    assert float(names["loss"]) < 1.0  # ten classes at random: 2.3
    assert jax.tree.structure(names["dense"]) == jax.tree.structure(names["params"])


def test_the_example_in_place_goes_there_and_back():
    params = {"up": {"kernel": jnp.ones((16, 16))}}
    names = {"jax": jax, "pj": pj, "params": jax.tree.map(jnp.copy, params)}
    exec(example("in_place=True"), names)
    np.testing.assert_array_equal(names["frozen"].params["up"]["kernel"], params["up"]["kernel"])


TINY = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
TINY |= {"num_hidden_layers": 1, "num_attention_heads": 2}


def test_the_example_of_rewritten_blocks_runs(monkeypatch):
    model = decoder(read_config(TINY))
    monkeypatch.setattr(pj, "load", lambda path: (model, model.init(jax.random.key(0))))
    names = {"jax": jax, "pj": pj}
    exec(example("pj.meft()"), names)
    params = names["method"].apply(names["frozen"], names["trainable"])
    assert names["forward"](params, {"input_ids": jnp.ones((1, 3), jnp.int32)}).shape == (1, 3, 64)


def test_the_example_of_a_plan_prints_its_peak(capsys):
    names = {"jax": jax, "jnp": jnp, "pj": pj, "optax": optax, "model": decoder(read_config(TINY))}
    exec(example("pj.plan").replace('"h200"', '"cpu"').replace("2048", "8"), names)
    assert "peak" in capsys.readouterr().out
