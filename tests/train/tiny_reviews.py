"""A tiny data set for TensorFlow Datasets, in a module that the library can import by name."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    pkg_dir_path = Path(__file__).parent
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain", description="Tiny.")]  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "sentence": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["bad", "good"]),
                "stars": tfds.features.Scalar(np.int64),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._examples(6), "test": self._examples(2), "hidden": self._examples(0)}

    def _generate_examples(self):
        """Never called: the base class wants it, and `_split_generators` gives each split its examples."""
        raise NotImplementedError

    def _examples(self, labeled):
        for i in range(labeled or 2):
            label = i % 2 if labeled else -1
            yield i, {"sentence": f"text {i}", "label": label, "stars": (i * 5) % 11}
