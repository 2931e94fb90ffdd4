"""What is judged: a tower of a checkpoint beside its baselines, on the images of two splits."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath

from cjepa_jax import pretrained, sharding
from cjepa_jax.config import Mesh, require
from cjepa_jax.data import pipeline, sources
from cjepa_jax.evaluate import features
from cjepa_jax.evaluate.config import Evaluation, resolve
from cjepa_jax.evaluate.sets import Splits, check_classes
from cjepa_jax.models.vit import parse_size

CHECKPOINT, UNTRAINED, PIXELS = "checkpoint", "untrained", "raw pixels"  # names of encoders


class Subject:
    """Loads what methods ask for, when they ask; images are read once for all of them.

    `data` and `crop_fraction` are the settings that hold, `networks` is what the
    checkpoint gave, `params` encoder's name -> parameters on all devices.
    """

    def __init__(self, checkpoint: epath.Path, tower: str, settings: Evaluation, *, baselines: bool, layers: int = 1):
        """layers: last blocks whose means the features concatenate, fewer where the encoder has fewer.

        Raises UserError for a checkpoint, or settings, that cannot be judged.
        """
        self.settings, self.tower = settings, tower
        self.workdir, self.saved = pretrained.describe(checkpoint)
        self.networks = pretrained.load(checkpoint, (tower,))
        model = self.networks.model
        self.data, self.crop_fraction = resolve(settings, self.saved)
        size = parse_size(model.size)
        self.width, self.depth, layers = size.width, size.depth, min(layers, size.depth)
        trained_size = self.networks.image_size
        encoder = features.encoder_for(model, image_size=self.data.image_size, trained_size=trained_size)
        values = model.patch_size**2 * self.data.channels
        patches = jax.ShapeDtypeStruct((1, encoder.grid**2, values), np.float32)
        init = functools.partial(encoder.init, jax.random.key(settings.seed))
        shapes = jax.eval_shape(init, patches)["params"]
        pretrained.check(self.networks.params[tower], shapes, f"checkpoint {checkpoint}: its {tower}")

        self.mesh = sharding.make_mesh(Mesh(fsdp=1, parameters="replicated"))
        apply = features.mean_features(model, self.data, trained_size=trained_size, layers=layers)
        encoders: dict[str, features.Apply] = {CHECKPOINT: apply}
        params: dict[str, Any] = {CHECKPOINT: self.networks.params[tower]}
        if baselines:
            encoders |= {UNTRAINED: apply, PIXELS: features.pixels}
            params |= {UNTRAINED: jax.jit(init)(np.zeros(patches.shape, np.float32))["params"], PIXELS: {}}
        whole = sharding.replicated(self.mesh)
        self.params = {name: jax.device_put(tree, whole) for name, tree in params.items()}
        self._encoders = encoders
        self.extractor = self.make_extractor(settings.data.batch_size)

    def make_extractor(self, batch_size: int) -> features.Extractor:
        """Of features of all encoders, by batches of this size."""
        return features.Extractor(self._encoders, self.mesh, batch_size=batch_size)

    @functools.cached_property
    def train(self) -> pipeline.Reader:
        """The training split; it need not have labels."""
        return self._reader(self.data.train_split)

    @functools.cached_property
    def test(self) -> pipeline.Reader:
        """The test split."""
        return self._reader(self.data.test_split)

    def _reader(self, split: str) -> pipeline.Reader:
        return pipeline.Reader(sources.load(self.data, split), self.data)

    @functools.cached_property
    def _features(self) -> dict[str, Splits]:
        self.check_labels()
        sets = []
        for reader in (self.train, self.test):
            view = pipeline.central_view(reader, crop_fraction=self.crop_fraction)
            sets.append(self.extractor.split(self.params, reader, range(len(reader.source)), view))
        train, test = sets
        names = f"data.train_split = {self.data.train_split!r}", f"data.test_split = {self.data.test_split!r}"
        check_classes(train[CHECKPOINT].labels, test[CHECKPOINT].labels, names=names)
        return {name: Splits(train[name], test[name]) for name in self.params}

    def splits(self, *, layers: int) -> dict[str, Splits]:
        """Encoder's name -> features of all central crops, of the last `layers` blocks, at most those asked for.

        Raises UserError where labels are missing, or a split lacks classes of the other.
        """
        return {
            name: Splits(
                *(images._replace(features=self.last(name, images.features, layers=layers)) for images in found)
            )
            for name, found in self._features.items()
        }

    def last(self, name: str, features: Any, *, layers: int) -> Any:
        """Of an encoder's features [n, D] those of its last `layers` blocks; pixels have no layers."""
        return features if name == PIXELS else features[:, -layers * self.width :]

    @property
    def classes(self) -> int:
        """How many the labels tell apart."""
        return len(self.train.source.classes)

    def save_with_head(self, path: epath.Path, head: dict[str, np.ndarray]) -> None:
        """The encoder with a classifier on its features, as a checkpoint, in the place of one that may be there."""
        if path.exists():
            path.rmtree()
        model = self.networks._replace(
            params=self.networks.params | {"head": head},
            classes=self.train.source.classes,
            predictor=None,
        )
        pretrained.save(path, model)

    def check_labels(self) -> None:
        """Raises UserError where a split has no labels."""
        for key, reader in (("train_split", self.train), ("test_split", self.test)):
            require(
                bool(reader.source.classes),
                f"data.{key} = {getattr(self.data, key)!r} has no labels; the methods collapse and attention need none",
            )
