"""T5 and mT5 against transformers: outputs and gradients in float32, and exported checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import all_but_slow
from tiny_t5 import token_batch, values

from peftjax.models.load import load
from peftjax.models.save import save

torch = pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# name -> (model_type, head, class without its prefix, its output, settings)
CASES = {
    "t5": ("t5", "seq2seq_lm", "ForConditionalGeneration", "logits", {}),
    "t5_untied": ("t5", "seq2seq_lm", "ForConditionalGeneration", "logits", {"untied": True}),
    "flan": ("t5", "seq2seq_lm", "ForConditionalGeneration", "logits", {**GATED, "untied": True}),
    "flan_tied": ("t5", "seq2seq_lm", "ForConditionalGeneration", "logits", GATED),
    "mt5": ("mt5", "seq2seq_lm", "ForConditionalGeneration", "logits", {**GATED, "untied": True}),
    "none": ("t5", "none", "Model", "last_hidden_state", GATED),
    "encoder": ("t5", "encoder", "EncoderModel", "last_hidden_state", {}),
    "classifier": ("t5", "classifier", "ForSequenceClassification", "logits", {"num_labels": 3}),
}
ENCODER, DECODER = "encoder.block.{}.layer.", "decoder.block.{}.layer."
POSITIONS = "0.SelfAttention.relative_attention_bias.weight"
CHOSEN = {
    "embed/word/embedding": "shared.weight",
    "embed/encoder_positions/embedding": ENCODER.format(0) + POSITIONS,
    "embed/decoder_positions/embedding": DECODER.format(0) + POSITIONS,
    "encoder/blocks/attention/query/kernel": ENCODER + "0.SelfAttention.q.weight",
    "encoder/blocks/feed_forward/down/kernel": ENCODER + "1.DenseReluDense.wo.weight",
    "encoder/blocks/feed_forward_norm/scale": ENCODER + "1.layer_norm.weight",
    "encoder/head/norm/scale": "encoder.final_layer_norm.weight",
    "blocks/attention/value/kernel": DECODER + "0.SelfAttention.v.weight",
    "blocks/cross_attention/query/kernel": DECODER + "1.EncDecAttention.q.weight",
    "blocks/cross_attention/key/kernel": DECODER + "1.EncDecAttention.k.weight",
    "blocks/cross_attention/output/kernel": DECODER + "1.EncDecAttention.o.weight",
    "blocks/cross_attention_norm/scale": DECODER + "1.layer_norm.weight",
    "blocks/feed_forward/down/kernel": DECODER + "2.DenseReluDense.wo.weight",
    "head/norm/scale": "decoder.final_layer_norm.weight",
    "head/output/kernel": "lm_head.weight",
    "head/classifier/dense/kernel": "classification_head.dense.weight",
}


def hf_class(case):
    kind, _, suffix, _, _ = CASES[case]
    return getattr(transformers, {"t5": "T5", "mt5": "MT5"}[kind] + suffix)


def hf_load(case, folder):
    return hf_class(case).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


QUICK = ("t5_untied", "flan_tied", "encoder", "classifier")


@pytest.fixture(scope="module", params=all_but_slow(CASES, QUICK))
def tiny(request, tmp_path_factory):
    """(case, folder) of a random model of transformers whose weights are far from trivial."""
    case = request.param
    settings = values(**CASES[case][4])
    untied = settings.pop("untied", False)
    torch.manual_seed(0)
    cls = hf_class(case)
    settings.pop("model_type")
    model = cls(cls.config_class(**settings))
    with torch.no_grad():
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(case)
    model.save_pretrained(folder)
    return case, folder


def batches(case):
    """Padding on either side of the text, and more tokens than a block of the attention's rows."""
    for settings in ({}, {"left": True}, {"length": 130, "target": 70, "seed": 1}):
        if "length" in settings and case not in ("t5", "flan"):
            return  # the stacks of the others are these
        batch = token_batch(**settings)
        if case in ("classifier", "encoder"):
            del batch["decoder_input_ids"]
        yield batch


def tensors(batch):
    return {name: torch.tensor(value, dtype=torch.long) for name, value in batch.items()}


def close(ours, theirs, name=""):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=name)


def leaf_of(gradients, path, case):
    """Our gradient at a path of the whole model, where this case has it."""
    if case == "encoder":
        if path.startswith("blocks") or path.startswith("head"):
            return None
        path = path.removeprefix("encoder/")
    for part in path.split("/"):
        gradients = gradients.get(part) if gradients is not None else None
    return gradients


def our_gradient(case, folder):
    """`(batch, probe) -> (outputs, gradients)` of the sum of `outputs * probe`, compiled once a shape."""
    model, params = load(folder, head=CASES[case][1])

    def projected(params, batch, probe):
        outputs = jnp.asarray(model(params, batch))
        return jnp.sum(outputs * probe), outputs

    run = jax.jit(jax.value_and_grad(projected, has_aux=True))

    def gradient(batch, probe):
        (_, outputs), gradients = run(params, batch, probe)
        return outputs, gradients

    return gradient


def compare(case, folder, batch, gradient):
    """Outputs, and the gradients of a random function of them, where there are tokens."""
    output = CASES[case][3]
    hf = hf_load(case, folder)
    theirs = hf(**tensors(batch))[output]
    probe = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    if case == "encoder":
        probe *= batch["attention_mask"][..., None]
    if "decoder_attention_mask" in batch:
        probe *= batch["decoder_attention_mask"][..., None]
    (theirs * torch.tensor(probe)).sum().backward()
    ours, gradients = gradient(batch, probe)
    close(ours * (probe != 0), theirs * torch.tensor(probe != 0))
    named = {name.removeprefix("transformer."): parameter for name, parameter in hf.named_parameters()}
    compared = 0
    for path, name in CHOSEN.items():
        ours = leaf_of(gradients, path, case)
        if ours is None:
            continue
        ours = ours[1] if "blocks/" in path else ours
        close(ours.T if path.endswith("kernel") else ours, named[name.format(1)].grad, path)
        compared += 1
    assert compared >= (5 if case == "encoder" else 14)


def test_outputs_and_gradients_agree(tiny):
    case, folder = tiny
    gradient = our_gradient(case, folder)
    for batch in batches(case):
        compare(case, folder, batch, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ["flan"], indirect=True)
def test_a_mask_of_the_decoder_and_ids_made_of_labels(tiny):
    case, folder = tiny
    batch = token_batch()
    masked = {**batch, "decoder_attention_mask": np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.int32)}
    compare(case, folder, masked, our_gradient(case, folder))
    labels = np.where(np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]), batch.pop("decoder_input_ids"), -100)
    compare(case, folder, {**batch, "labels": labels.astype(np.int32)}, our_gradient(case, folder))


def test_export_gives_transformers_the_same_outputs(tiny, tmp_path):
    case, folder = tiny
    save(tmp_path, *load(folder, head=CASES[case][1]))
    inputs = tensors(next(batches(case)))
    with torch.no_grad():
        before, after = (hf_load(case, path)(**inputs)[CASES[case][3]] for path in (folder, tmp_path))
    assert torch.equal(before, after)


def test_buckets_are_those_of_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    from peftjax.models.t5_positions import bucket_of

    distances = np.arange(-600, 601)
    for both_sides in (True, False):
        for buckets, farthest in ((32, 128), (32, 256), (8, 12), (16, 100), (64, 512)):
            theirs = T5Attention._relative_position_bucket(
                torch.tensor(distances), both_sides, buckets, farthest
            ).numpy()
            settings = {"buckets": buckets, "farthest": farthest, "both_sides": both_sides}
            np.testing.assert_array_equal(bucket_of(distances, **settings), theirs)
