"""The labels that VTAB derives from Clevr's scenes, read from a data set in TFDS' own format."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cjepa_jax.data import pipeline, sources
from tests.helpers import encoded

CLASSES = {
    "color": ["gray", "blue", "brown", "yellow", "red", "green", "purple", "cyan"],
    "material": ["rubber", "metal"],
    "shape": ["cube", "sphere", "cylinder"],
    "size": ["small", "large"],
}
# Of each image the depths of its objects; its position in the list is the colour of its pixels.
SCENES = {
    "train": [[12.5, 7.0, 9.0], [8.0] + [11.0] * 9, [8.0001, 30.0, 12.0, 9.9], [9.25, 9.75, 10.5, 14.0, 9.5]],
    "validation": [[10.0, 10.5, 11.0], [10.25] * 4, [9.5, 9.75, 120.0], [9.0] * 10],
    "test": [[], []],  # whose scenes are secret
}


class Clevr(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features of TFDS' clevr 3.1.0."""

    VERSION = tfds.core.Version("3.1.0")

    def _info(self):
        objects = {key: tfds.features.ClassLabel(names=names) for key, names in CLASSES.items()}
        objects |= {
            key: tfds.features.Tensor(shape=shape, dtype=np.float32)
            for key, shape in {"rotation": (), "3d_coords": (3,), "pixel_coords": (3,)}.items()
        }
        answers = {key: tfds.features.Text() for key in ("question", "answer")}
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "file_name": tfds.features.Text(),
                "objects": tfds.features.Sequence(objects),
                "question_answer": tfds.features.Sequence(answers),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SCENES}

    def _generate_examples(self, split):
        for i, depths in enumerate(SCENES[split]):
            image = encoded(Image.new("RGB", (24, 16), (i, i, i)))
            objects = [
                {key: k % len(names) for key, names in CLASSES.items()}
                | {"rotation": 30.0, "3d_coords": [1.0, 2.0, 3.0], "pixel_coords": [200.0, 5.0, depth]}
                for k, depth in enumerate(depths)
            ]
            answers = [{"question": "How many?", "answer": str(len(depths))}]
            name = f"CLEVR_{split}_{i}.png"
            yield name, {"image": image, "file_name": name, "objects": objects, "question_answer": answers}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    tfds.disable_progress_bar()
    path = tmp_path_factory.mktemp("tfds")
    Clevr(data_dir=path, file_format="array_record").download_and_prepare()
    return str(path)


@pytest.fixture
def load(make_config, data_dir):
    def load(source, split):
        settings = {"source": source, "data_dir": data_dir, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        data = make_config(**{f"data__{key}": value for key, value in settings.items()}).data
        return data, sources.load(data, split)

    return load


def labels(data, source):
    """Colour of an image -> its label."""
    batches = pipeline.ordered_batches(pipeline.Reader(source, data), size=8, crop_fraction=1.0)
    return {int(image[0, 0, 0]): label for images, found in batches for image, label in zip(images, found, strict=True)}


@pytest.mark.parametrize(
    "source, split, expected",
    [
        ("clevr_count", "train", [0, 7, 1, 2]),
        ("clevr_count", "validation", [0, 1, 0, 7]),
        ("clevr_distance", "train", [0, 0, 1, 3]),  # 7.0, 8.0, 8.0001, 9.25
        ("clevr_distance", "validation", [4, 5, 3, 2]),  # 10.0, 10.25, 9.5, 9.0
        ("clevr_count", "test", [None, None]),
        ("clevr_distance", "test", [None, None]),
    ],
)
def test_labels_are_those_of_vtab(load, source, split, expected):
    data, found = load(source, split)
    assert labels(data, found) == dict(enumerate(expected))
    assert len(found.classes) == {"clevr_count": 8, "clevr_distance": 6}[source]


def test_a_task_is_no_other(load):
    """Else the features or checkpoints of one would be taken for those of the other."""
    fingerprints = {load(source, "train")[1].fingerprint for source in ("clevr_count", "clevr_distance")}
    assert len(fingerprints) == 2
