"""The digits of scikit-learn: 1,797 scanned handwritten digits of 8 x 8 pixels, bundled with it."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from peftjax.core.errors import PeftError
from peftjax.losses import Batch

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels."""

    pixels: Float[np.ndarray, "N 1 8 8"]
    """In [-1, 1]."""
    labels: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[np.ndarray, "M"]) -> "Images":
        """Some of the images."""
        return Images(self.pixels[rows], self.labels[rows])

    def batch(self, rows: Int[np.ndarray, "B"] | slice = slice(None)) -> Batch:
        """The images `rows`, by default all, as a batch of ViT's."""
        labels = self.labels[rows]
        return {
            "pixel_values": self.pixels[rows],
            "labels": labels,
            "weights": np.ones(len(labels), np.float32),
        }


def load_images() -> Images:
    """All digits.

    Raises:
        PeftError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise PeftError("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    pixels = (found.images[:, None] / 8.0 - 1.0).astype(np.float32)
    return Images(pixels, found.target.astype(np.int32))


def of_classes(images: Images, first: int, count: int) -> Images:
    """The images of `count` classes from `first` on, which becomes class 0."""
    labels = images.labels - first
    rows = np.flatnonzero((labels >= 0) & (labels < count))
    return Images(images.pixels[rows], labels[rows].astype(np.int32))


def draw(images: Images, per_class: int, generator: np.random.Generator) -> tuple[Images, Images]:
    """`per_class` images of each class at random, and the others.

    Raises:
        PeftError: a class has fewer.
    """
    chosen = []
    for label in np.unique(images.labels):
        rows = np.flatnonzero(images.labels == label)
        if len(rows) < per_class:
            raise PeftError(f"class {label} has {len(rows)} images, fewer than the {per_class} asked for")
        chosen.append(generator.permutation(rows)[:per_class])
    rows = np.concatenate(chosen)
    return images.take(rows), images.take(np.setdiff1d(np.arange(len(images)), rows))


def training_batches(images: Images, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches; every epoch is a new order, and a batch may end one and begin the next."""
    generator = np.random.default_rng(seed)
    rows = np.empty(0, np.int64)
    while True:
        while len(rows) < size:
            rows = np.concatenate([rows, generator.permutation(len(images))])
        yield images.batch(rows[:size])
        rows = rows[size:]
