"""The settings of `python -m cjepa_jax.evaluate`; the evaluators and their settings are its groups."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from cjepa_jax import config
from cjepa_jax.errors import require
from cjepa_jax.evaluate.accuracy import Accuracy
from cjepa_jax.evaluate.attention import Attention
from cjepa_jax.evaluate.base import Evaluator
from cjepa_jax.evaluate.collapse import Collapse
from cjepa_jax.evaluate.davis import Davis
from cjepa_jax.evaluate.decoder import Decoder
from cjepa_jax.evaluate.feature_map import FeatureMap
from cjepa_jax.evaluate.knn import Knn
from cjepa_jax.evaluate.linear import Linear
from cjepa_jax.evaluate.logistic import Logistic
from cjepa_jax.evaluate.neighbours import Neighbours
from cjepa_jax.evaluate.segmentation import Segmentation
from cjepa_jax.settings import group, parse_flat, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """The images; a setting that is None is taken from the checkpoint's config.json."""

    source: config.SourceKind | None = setting(None, "The kind of data set; see docs/data.md.")
    name: str | None = setting(None, "Name of a TFDS set.")
    data_dir: str | None = setting(None, "Where the data set lies.")
    train_split: str | None = setting(None, "The images to learn from.")
    test_split: str | None = setting(None, "The images to evaluate on.")
    image_size: int | None = setting(
        None, "Pixels per side, or of height; positions are interpolated where training had others.", within="[1, 8192]"
    )
    image_width: int | None = setting(
        None, "Pixels of width, where image_size is only the height; 0: the images are square.", within="[0, 8192]"
    )
    crop_fraction: float | None = setting(
        None, "Side of the central crop over that of the largest one of its shape.", within="[0.01, 1]"
    )
    decoder: Literal["fast", "pillow"] | None = setting(None, "As in training.")
    batch_size: int = setting(
        256, "Images of a batch over all devices; rounded up to a multiple of them.", within="[1, 1048576]"
    )
    threads: int = setting(0, "Decoding threads, 0: one per core.", within="[0, 1024]")
    max_bad_fraction: float = setting(
        0.01, "Share of the images that may be unreadable and are left out.", within="[0, 1]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomViews:
    """How random views are drawn, for linear.augment and the collapse report; ImageNet's usual crops by default."""

    crop_scale: tuple[float, float] = setting((0.08, 1.0), "Share of the image's area.", within="(0, 1]")
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "Aspect ratio, drawn in log space, in multiples of the result's.", within="[0.01, 100]"
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.", within="[0, 1]")
    color: float = setting(0.0, "Strength of SimCLR's colour distortion.", within="[0, 10]")
    blur: float = setting(0.0, "Probability of SimCLR's Gaussian blur.", within="[0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All settings of one evaluation; each group that is an `Evaluator` is one."""

    seed: int = setting(0, "Root of all random draws.", within="[0, 4294967295]")
    data: Images = group(Images, "The images; a setting that is None is taken from the checkpoint's config.json.")
    views: RandomViews = group(RandomViews, "How random views are drawn, for linear.augment and collapse.")
    knn: Knn = group(Knn, "Nearest neighbours by cosine, with all labels and with few.")
    logistic: Logistic = group(Logistic, "Logistic regression, with all labels and with few.", formerly="lowshot")
    linear: Linear = group(Linear, "Linear probe: a grid of classifiers trained by SGD.")
    accuracy: Accuracy = group(Accuracy, "A fine-tuned network's own head.")
    collapse: Collapse = group(Collapse, "Statistics of the features, which need no labels.")
    attention: Attention = group(Attention, "Pictures of the last layer's attention and of main components.")
    neighbours: Neighbours = group(Neighbours, "Pictures of test images beside their nearest training images.")
    map: FeatureMap = group(FeatureMap, "Features of test images as points in the plane, by PCA and t-SNE.")
    davis: Davis = group(Davis, "Masks propagated through DAVIS-2017's videos.")
    segmentation: Segmentation = group(
        Segmentation, "Segmentation by heads on the features of patches, scored by mIoU."
    )
    decoder: Decoder = group(Decoder, "Pixels of patches decoded from their features by ridge regression.")

    @property
    def evaluators(self) -> dict[str, Evaluator]:
        """Lists the evaluators, with their settings, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Evaluator)}


def resolve(evaluation: Evaluation, saved: Mapping[str, Any], *, reads_data: bool = True) -> tuple[config.Data, float]:
    """Completes the images' settings by those of the checkpoint's flat config.json, `saved`; gives crop_fraction too.

    reads_data: whether any of these images will be looked at; else it need not be known which they are.

    Raises UserError for a setting that neither of them has.
    """
    data = evaluation.data
    fallback = {"name": "", "data_dir": "", "crop_fraction": 0.875, "decoder": "fast", "image_width": 0}
    if not reads_data:
        fallback |= {"source": "own", "train_split": "", "test_split": ""}
    if data.source not in (None, saved.get("data.source")):  # what belongs to another kind says nothing about this one
        saved = {**saved, "data.name": "", "data.data_dir": ""}

    def find(key: str) -> Any:
        value = getattr(data, key)
        if value is not None:
            return value
        value = saved.get("eval.crop_fraction" if key == "crop_fraction" else f"data.{key}", fallback.get(key))
        require(value is not None, f"data.{key}: the checkpoint does not say it; give --config.data.{key}=...")
        return value

    names = ("source", "name", "data_dir", "train_split", "test_split", "image_size", "image_width", "decoder")
    known = {key: find(key) for key in names} | dataclasses.asdict(evaluation.views)
    known |= {key: saved.get(f"data.{key}") for key in ("mean", "std")}
    known |= {"batch_size": max(2, data.batch_size), "threads": data.threads, "prefetch": 1}
    known["max_bad_fraction"] = data.max_bad_fraction
    if isinstance(known["mean"], list) and len(known["mean"]) == 1:  # of grey images
        known["color"] = 0.0
    resolved = parse_flat({f"data.{key}": value for key, value in known.items()}, config.Data, "data.")
    share = parse_flat({"eval.crop_fraction": find("crop_fraction")}, config.Eval, "eval.")
    return resolved, share.crop_fraction
