"""The transfer between digits, on random images of the same shape."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import peftjax as pj
from experiments.digits_transfer.data import Images, draw, load_images, of_classes, training_batches
from experiments.digits_transfer.pretrain import Pretrained, Pretraining, pretrain
from experiments.digits_transfer.run import Options, compare, describe
from experiments.digits_transfer.transfer import Transfer, make_tasks
from experiments.harness.contenders import Contender
from peftjax.core.errors import PeftError

SMALL = Options(
    output=Path("unused"),
    pretraining=Pretraining(width=8, layers=1, steps=2, batch=4, held_out=2),
    transfer=Transfer(shots=2, validation=2, test=2, seeds=2, steps=2, batch=4, rates=(1e-3, 1e-2)),
)


@pytest.fixture(scope="module")
def images() -> Images:
    pixels = np.random.default_rng(0).uniform(-1, 1, (80, 1, 8, 8)).astype(np.float32)
    return Images(pixels, np.arange(80, dtype=np.int32) % 10)


@pytest.fixture(scope="module")
def base(images) -> Pretrained:
    return pretrain(images, SMALL.pretraining)


@pytest.mark.slow
def test_methods_are_compared_end_to_end(images, tmp_path):
    chosen = (
        Contender("full", lambda setting: pj.full(), matched=False),
        Contender("LoRA", lambda setting: pj.lora(rank=1)),
    )
    options = dataclasses.replace(SMALL, output=tmp_path)
    results = compare(images, chosen, options, Console(quiet=True))
    full, lora = results["lines"]
    head = results["head_parameters"]
    assert full["trained"] == results["parameters"] - head
    assert lora["trained"] == 4 * (8 + 8) + 2 * (8 + 16)
    assert len(lora["accuracy"]) == 2
    assert lora["rate"] in SMALL.transfer.rates
    assert set(lora["validation"]) == {"0.001", "0.01"}
    assert "2 steps of 4 images, 2 seeds, 10 test images" in describe(results)
    assert compare(images, chosen, options, Console(quiet=True))["lines"] == results["lines"]  # recorded


@pytest.mark.slow
def test_methods_of_different_sizes_are_refused(images, tmp_path):
    chosen = [Contender(f"rank {rank}", lambda setting, rank=rank: pj.lora(rank=rank)) for rank in (1, 2)]
    with pytest.raises(PeftError, match="rank 2 trains 224 parameters and rank 1 112"):
        compare(images, chosen, dataclasses.replace(SMALL, output=tmp_path), Console(quiet=True))


@pytest.mark.slow
def test_a_seed_changes_images_and_classifier_but_not_the_body_or_the_test(images, base):
    tasks, test = make_tasks(images, base, SMALL.transfer)
    again, test_again = make_tasks(images, base, dataclasses.replace(SMALL.transfer, seeds=1))
    first, second = tasks
    assert not np.array_equal(first.train.pixels, second.train.pixels)
    kernels = [task.params["head"]["classifier"]["kernel"] for task in tasks]
    assert not np.array_equal(*kernels)
    assert first.params["blocks"] is second.params["blocks"] is base.params["blocks"]
    assert np.array_equal(first.train.pixels, again[0].train.pixels)
    assert np.array_equal(test.pixels, test_again.pixels)


@pytest.mark.slow
def test_training_validation_and_test_share_no_image(images, base):
    tasks, test = make_tasks(images, base, SMALL.transfer)
    for task in tasks:
        parts = [{image.tobytes() for image in part.pixels} for part in (task.train, task.validation, test)]
        assert [len(part) for part in parts] == [10, 10, 10]
        assert len(set.union(*parts)) == 30


def test_a_class_with_too_few_images_is_refused(images):
    with pytest.raises(PeftError, match="class 0 has 8 images, fewer than the 9 asked for"):
        draw(images, 9, np.random.default_rng(0))


def test_an_epoch_of_batches_has_every_image_once(images):
    batches = training_batches(images, 5, seed=0)
    seen = np.concatenate([next(batches)["pixel_values"] for _ in range(16)])
    assert len({image.tobytes() for image in seen}) == len(images)


@pytest.mark.slow
def test_the_real_digits_are_images_of_ten_classes():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    images = load_images()
    assert images.pixels.shape == (1797, 1, 8, 8)
    assert images.pixels.min() == -1.0
    assert images.pixels.max() == 1.0
    new = of_classes(images, 5, 5)
    assert len(new) == 896
    assert set(new.labels) == {0, 1, 2, 3, 4}
