import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tiny

from peftjax.core.errors import PeftError
from peftjax.train.data import batches
from peftjax.train.data.dataset import Split


def encode(texts, max_length):
    return [[ord(letter) for letter in text][:max_length] for text in texts]


@pytest.fixture
def split():
    lengths = np.random.default_rng(0).integers(1, 60, size=90)
    texts = tuple(chr(200 + i) * int(length) for i, length in enumerate(lengths))
    labels = tuple(i % 7 for i in range(90))
    return batches.tokenize(Split(texts, labels), encode, max_length=40, pad_id=0)


def test_bucket_lengths():
    assert batches.bucket_lengths(100) == (16, 32, 64, 100)
    assert batches.bucket_lengths(64) == (16, 32, 64)
    assert batches.bucket_lengths(8) == (8,)


def test_every_epoch_has_every_example_once(split):
    stream = batches.training_batches(split, batch_size=10, seed=3)
    first, second = ([next(stream) for _ in range(9)] for _ in range(2))
    for epoch in (first, second):
        seen = Counter(int(row[0]) for batch in epoch for row in batch["input_ids"])
        assert seen == Counter(range(200, 290))
    assert any((a["labels"] != b["labels"]).any() for a, b in zip(first, second))


def test_batches_fit_their_bucket(split):
    stream = batches.training_batches(split, batch_size=10, seed=3)
    taken = [next(stream) for _ in range(9)]
    for batch in taken:
        lengths = batch["attention_mask"].sum(axis=1)
        size = batch["input_ids"].shape[1]
        assert size == next(b for b in (16, 32, 40) if b >= lengths.max())
        assert ((batch["input_ids"] != 0) == batch["attention_mask"]).all()
        assert {batch[k].dtype.name for k in ("input_ids", "attention_mask", "labels")} == {"int32"}
    assert len({batch["input_ids"].shape[1] for batch in taken}) == 3


def test_restored_iterator_continues_with_the_next_batch(split):
    stream = batches.training_batches(split, batch_size=7, seed=5)
    for _ in range(15):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(20)]
    resumed = batches.training_batches(split, batch_size=7, seed=5)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_equal(next(resumed), batch)


def test_evaluation_counts_every_example_once(split):
    taken = list(batches.evaluation_batches(split, 32))
    weights = np.concatenate([batch["weights"] for batch in taken])
    labels = np.concatenate([batch["labels"] for batch in taken])
    assert weights.sum() == 90
    assert len(weights) == 96
    shortest_first = np.argsort(split.lengths, kind="stable")
    np.testing.assert_array_equal(labels[weights > 0], split.labels[shortest_first])
    assert all(a["input_ids"].shape[1] <= b["input_ids"].shape[1] for a, b in pairwise(taken))
    assert (taken[-1]["attention_mask"].sum(axis=1) > 0).all()


def test_a_batch_larger_than_the_data(split):
    batch = next(batches.training_batches(split, batch_size=100, seed=0))
    assert batch["weights"].sum() == 100


def test_bad_tokenizer():
    with pytest.raises(PeftError, match="0 tokens for example 1"):
        batches.tokenize(Split(("a", ""), (0, 0)), encode, max_length=4, pad_id=0)


def test_a_sample_has_whole_examples_in_their_order():
    split = tiny.data()
    part = batches.sample(split, 10, seed=1)
    assert len(part) == len(part.labels) == 10
    whole = [split.ids[split.starts[i] : split.starts[i + 1]].tolist() for i in range(len(split))]
    found = [part.ids[part.starts[i] : part.starts[i + 1]].tolist() for i in range(10)]
    at = -1
    for tokens, label in zip(found, part.labels):
        at = next(i for i in range(at + 1, len(whole)) if (whole[i], split.labels[i]) == (tokens, label))
    assert batches.sample(split, 1000, seed=1) is split
