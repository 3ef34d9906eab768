"""The small decoder from scratch: a folder that `train` takes."""

import json

import jax.numpy as jnp
import pytest

from experiments.pretrain_tiny.run import Options, pretrain, write_model
from peftjax.core.errors import PeftError
from peftjax.models.load import load
from peftjax.text.chat import compile_template, render_marked
from peftjax.text.tokenizer import load_tokenizer


@pytest.mark.slow
def test_it_learns_and_leaves_a_hugging_face_folder(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat\n" * 200)
    options = Options(
        tmp_path / "tiny",
        text,
        vocab_size=280,
        width=32,
        layers=1,
        length=32,
        steps=40,
        batch_size=8,
        learning_rate=2e-2,
    )
    summary = pretrain(options)
    assert summary["loss"] < 0.5 * summary["loss_before"]
    model, params = load(options.output, head="causal_lm")
    tokenizer = load_tokenizer(options.output, decoder=True)
    ids = tokenizer.token_ids(["the cat sat on"])[0]
    guess = int(jnp.asarray(model(params, {"input_ids": jnp.array([ids])}))[0, -1].argmax())
    assert " the".startswith(tokenizer.decode([guess]))
    assert len(tokenizer.stop_ids) == 2
    template = compile_template(tokenizer.chat_template(), tokenizer.special_tokens)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written, spans = render_marked(template, chat)
    assert [written[start:stop] for start, stop in spans] == ["b<|im_end|>"]
    before = (options.output / "model.safetensors").read_bytes()
    assert pretrain(options)["loss"] == summary["loss"]
    assert (options.output / "model.safetensors").read_bytes() == before


def test_a_width_without_whole_heads_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "WordLevel",
        "vocab": {"a": 0}, "unk_token": "a"}}))  # fmt: skip
    with pytest.raises(PeftError, match="width is 40, but has to be a multiple of 32"):
        write_model(tmp_path, Options(tmp_path, width=40))
