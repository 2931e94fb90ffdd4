"""The settings of `python -m cjepa_jax.evaluate`, their meaning and their checks (see cjepa_jax/config.py)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from cjepa_jax import config
from cjepa_jax.config import at_least, require

KNN_TEMPERATURE = 0.07  # DINO's


@dataclasses.dataclass(frozen=True)
class Data:
    """The images; what is None is as in the checkpoint's config.json."""

    source: config.Source | None  # as in cjepa_jax/config.py
    name: str | None
    data_dir: str | None
    train_split: str | None
    test_split: str | None
    image_size: int | None  # another one than in training: positions are interpolated
    crop_fraction: float | None  # side of the central crop over the short side of the image
    decoder: Literal["fast", "pillow"] | None
    batch_size: int  # over all devices; rounded up to a multiple of them
    threads: int  # decoding threads, 0: one a core
    max_bad_fraction: float  # of the images that cannot be read and are left out

    def __post_init__(self):
        at_least("data", 1, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True)
class Views:
    """How views are drawn: random-resized crops and flips."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    color: float
    blur: float


@dataclasses.dataclass(frozen=True)
class Knn:
    """Nearest neighbours by cosine."""

    neighbours: int  # k
    temperature: float  # of the weighted vote: exp(cosine / temperature)

    def __post_init__(self):
        at_least("knn", 1, neighbours=self.neighbours)
        require(self.temperature > 0, f"knn.temperature must be positive, got {self.temperature}")


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear classifier behind a batch norm without affine, by SGD with Nesterov momentum 0.9."""

    layers: tuple[int, ...]  # last blocks whose means are concatenated; each number is a representation to try
    learning_rates: tuple[float, ...]  # the grid, trained at once: for 256 images, scaled with batch_size
    weight_decays: tuple[float, ...]
    epochs: int
    min_steps: int  # where these epochs have fewer steps, they are repeated, and decay_every is multiplied alike
    decay_every: int  # epochs after which the learning rate is a tenth
    batch_size: int
    holdout: float  # share of the training images that choose the member of the grid
    augment: bool  # features of new random views each epoch, instead of those of central crops, computed once

    def __post_init__(self):
        at_least("linear", 1, epochs=self.epochs, min_steps=self.min_steps, decay_every=self.decay_every)
        at_least("linear", 2, batch_size=self.batch_size)
        at_least("linear", 1, **{f"layers[{i}]": x for i, x in enumerate(self.layers)})
        for key in ("layers", "learning_rates", "weight_decays"):
            require(len(getattr(self, key)) > 0, f"linear.{key} is empty")
        require(0 < self.holdout < 1, f"linear.holdout must be in (0, 1), got {self.holdout}")


@dataclasses.dataclass(frozen=True)
class Lowshot:
    """Logistic regression on few labels."""

    fraction: float  # of the labels, drawn in equal shares of the classes, at least one each
    shots: tuple[int, ...]  # labels a class
    draws: int

    def __post_init__(self):
        require(0 < self.fraction <= 1, f"lowshot.fraction must be in (0, 1], got {self.fraction}")
        at_least("lowshot", 1, draws=self.draws, **{f"shots[{i}]": x for i, x in enumerate(self.shots)})


@dataclasses.dataclass(frozen=True)
class Collapse:
    """Statistics of the features, no labels needed."""

    images: int  # of the training split, for std, rank, spectrum, uniformity
    objects: int  # images whose views LiDAR and alignment compare
    views: int  # of each

    def __post_init__(self):
        at_least("collapse", 2, images=self.images, objects=self.objects, views=self.views)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Pictures of the last layer's attention, and of the main components of patch features."""

    images: int  # of the test split, evenly spread
    query: tuple[int, ...]  # (row, column) of the patch whose attention is shown; () is the mean over all patches
    other: str  # a second checkpoint to show beside the first; "": none

    def __post_init__(self):
        at_least("attention", 1, images=self.images)
        require(len(self.query) in (0, 2), f"attention.query must be () or (row, column), got {self.query}")


@dataclasses.dataclass(frozen=True)
class Davis:
    """Masks propagated through DAVIS-2017's videos."""

    data_dir: str  # the folder that holds JPEGImages, Annotations and ImageSets
    short_side: int  # of the frames as they are encoded

    def __post_init__(self):
        at_least("davis", 1, short_side=self.short_side)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All settings of one evaluation."""

    seed: int
    data: Data
    views: Views
    knn: Knn
    linear: Linear
    lowshot: Lowshot
    collapse: Collapse
    attention: Attention
    davis: Davis

    def __post_init__(self):
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")


def resolve(evaluation: Evaluation, saved: Mapping[str, Any]) -> tuple[config.Data, float]:
    """The images as a Reader takes them, and crop_fraction; `saved` is the checkpoint's flat config.json.

    Raises UserError for a setting that neither of them has.
    """
    data = evaluation.data
    fallback = {"name": "", "data_dir": "", "crop_fraction": 0.875, "decoder": "fast"}

    def setting(key: str) -> Any:
        value = getattr(data, key)
        if value is not None:
            return value
        value = saved.get("eval.crop_fraction" if key == "crop_fraction" else f"data.{key}", fallback.get(key))
        require(value is not None, f"data.{key}: the checkpoint does not say it; give --config.data.{key}=...")
        return value

    names = ("source", "name", "data_dir", "train_split", "test_split", "image_size", "decoder")
    views = dataclasses.asdict(evaluation.views)
    if len(saved["data.mean"]) == 1:
        views["color"] = 0.0
    resolved = config.Data(
        **{key: setting(key) for key in names},
        **views,
        mean=tuple(saved["data.mean"]),
        std=tuple(saved["data.std"]),
        batch_size=max(2, data.batch_size),
        threads=data.threads,
        prefetch=1,
        max_bad_fraction=data.max_bad_fraction,
    )
    return resolved, setting("crop_fraction")
