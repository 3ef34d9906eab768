"""The test extra has no TensorFlow, so all of this also shows that none is needed."""

import pytest

from peftjax.core.errors import PeftError
from peftjax.train.data.tfds import tfds_dataset

tiny_reviews = pytest.importorskip(
    "tiny_reviews", exc_type=ImportError, reason="peftjax[tfds] is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    builder = tiny_reviews.TinyReviews(data_dir=path, config="plain", file_format="array_record")
    builder.download_and_prepare()
    return path


def test_by_name_with_class_names(folder):
    data = tfds_dataset("tfds:tiny_reviews/plain", data_dir=folder)
    assert data.label_names == ("bad", "good")
    assert sorted(zip(data.train.texts, data.train.labels))[:2] == [("text 0", 0), ("text 1", 1)]
    assert (len(data.train), len(data.evaluation)) == (6, 2)


def test_integer_label_feature_and_slices(folder):
    data = tfds_dataset(
        "tiny_reviews/plain",
        data_dir=folder,
        label_column="stars",
        train_split="train",
        evaluation_split="train[:50%]",
    )
    assert data.label_names == ("0", "3", "4", "5", "9", "10")
    assert len(data.evaluation) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tfds:tiny_reviewz"}, "tiny_reviewz cannot be loaded"),
        ({"text_column": "setnence"}, "did you mean 'sentence'"),
        ({"train_split": "training"}, "no split 'training'"),
        ({"evaluation_split": "hidden"}, "has no label"),
    ],
)
def test_errors(folder, options, message):
    with pytest.raises(PeftError, match=message):
        tfds_dataset(**{"name": "tfds:tiny_reviews/plain", "data_dir": folder, **options})
