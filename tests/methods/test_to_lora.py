"""Any adapter as a LoRA of a chosen rank."""

import numpy as np
import pytest
from support import KEY, assert_close, example_of, normal, quick_at
from tiny_models import EVERY_WEIGHT, moved, tiny

import peftjax as pj
from peftjax.core import tree
from peftjax.core.errors import PeftError
from peftjax.testing.methods import begun
from peftjax.weights.canonical import to_canonical
from peftjax.weights.layout import layout_of

MODEL = tiny("words")
STACKED = {"blocks": {"up": {"weight": normal(KEY, (2, 5, 8))}}}


def converted(method, rank, params=MODEL.params, base=None):
    frozen, trainable = method.init(KEY, params)
    trained = moved(trainable)
    found = pj.adapters.to_lora(method, frozen, trained, rank=rank, params=base)
    frozen_lora, _ = found.method.init(KEY, params)
    return found, found.method.merge(frozen_lora, found.trainable), method.merge(frozen, trained)


@pytest.mark.parametrize(
    "method",
    quick_at(
        [
            pj.lora(rank=2, targets=EVERY_WEIGHT),
            pj.paca(rank=2, targets=EVERY_WEIGHT),
            pj.paca(rank=2, in_place=True),
            pj.rows([1, 3]),
        ],
        every=2,
    ),
    ids=["lora", "paca", "paca in place", "rows"],
)
def test_a_change_of_that_rank_is_converted_exactly(method):
    found, merged, wanted = converted(method, 2)
    assert_close(merged, wanted)
    assert max(found.errors.values()) < 1e-5
    assert all(slots["a"].shape[-2] == 2 for slots in found.trainable.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shira", "sara", "dora"])
def test_the_error_is_that_of_the_best_approximation(name):
    found, merged, wanted = converted(example_of(name), 3)
    for path, error in found.errors.items():
        module, leaf = path.split("/")
        change = wanted[module][leaf] - MODEL.params[module][leaf]
        left = np.linalg.norm(wanted[module][leaf] - merged[module][leaf]) / np.linalg.norm(change)
        sizes = np.linalg.svd(change, compute_uv=False)
        best = np.linalg.norm(sizes[3:]) / np.linalg.norm(sizes)
        np.testing.assert_allclose([error, left], best, atol=1e-5)
        assert error > 1e-3


@pytest.mark.slow
def test_a_stack_in_another_layout():
    found, merged, wanted = converted(pj.paca(rank=2), 4, STACKED)
    assert_close(merged, wanted)
    assert found.trainable["blocks/up/weight"]["a"].shape == (2, 4, 8)


def test_what_is_no_matrix_stays_as_it_was_trained():
    method = pj.chain(pj.shira(rank=2), pj.unfreeze(["norm", "up"]))
    with pytest.raises(PeftError, match="is trained as it is; give the base as params"):
        converted(pj.chain(pj.shira(rank=2, targets=["down"]), pj.unfreeze(["norm"])), 8)
    method = pj.chain(pj.shira(rank=2, targets=["down"]), pj.unfreeze(["norm", "up"]))
    found, merged, wanted = converted(method, 8, base=MODEL.params)
    assert set(found.trainable["unfreeze"]) == {"norm/scale", "norm/bias", "up/bias"}
    assert set(found.trainable["lora"]) == {"down/kernel", "up/kernel"}
    assert_close(merged, wanted)


def test_pissa_becomes_a_lora_of_the_original_base():
    found, merged, wanted = converted(pj.pissa(rank=2), 4, base=MODEL.params)
    assert_close(merged, wanted)
    assert max(found.errors.values()) < 1e-4


def test_errors():
    method = pj.lora(rank=2)
    frozen, fresh = method.init(KEY, MODEL.params)
    with pytest.raises(PeftError, match="rank must be positive"):
        pj.adapters.to_lora(method, frozen, fresh, rank=0)
    with pytest.raises(PeftError, match="lora has changed no weight"):
        pj.adapters.to_lora(method, frozen, fresh, rank=2)


NO_WEIGHT = ("beft", "bitfit", "ln_tuning", "unfreeze")
REFUSED = "^merge: .* adds |has no merged weight|has changed no weight|so that there is no difference"
"""Why an adapter is no LoRA: it adds to the model, acts on some tokens, trains no weight, or adds layers."""


@pytest.mark.parametrize("name", quick_at(list(pj.METHODS), every=12))
def test_every_adapter_becomes_a_lora_or_says_why_not(name):
    info, model = pj.METHODS[name], tiny("backbone" if pj.METHODS[name].of_blocks else "words")
    method = example_of(name)
    frozen, trainable = begun(method, model.params)
    trained = moved(trainable)

    def to_lora(rank):
        return pj.adapters.to_lora(method, frozen, trained, rank=rank, params=model.params)

    if name in NO_WEIGHT or not info.mergeable:
        with pytest.raises(PeftError, match=REFUSED):
            to_lora(1)
        return
    whole, wanted = to_lora(1000), method.merge(frozen, trained)
    assert_close(whole.method.merge(whole.method.init(KEY, model.params)[0], whole.trainable), wanted)
    first, bases = to_lora(1), tree.named_leaves(model.params)
    for path, error in first.errors.items():
        layout = layout_of(path, bases, None)
        change = np.asarray(to_canonical(tree.named_leaves(wanted)[path] - bases[path], layout), np.float64)
        sizes = np.linalg.svd(change, compute_uv=False)
        left = np.linalg.norm(sizes[..., 1:]) / np.linalg.norm(sizes)
        np.testing.assert_allclose([whole.errors[path], error], [0.0, left], atol=1e-3)
