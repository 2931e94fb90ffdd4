"""Semantic segmentation by small heads on the frozen features of patches, scored by mIoU as ADE20K is.

The data set is read in the layout of ADE20K's SceneParsing release (Zhou et al., CVPR 2017):
images/{training,validation}/*.jpg, annotations/{training,validation}/*.png.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from matplotlib import colormaps
from PIL import Image

from cjepa_jax import plots
from cjepa_jax.config import grid_of
from cjepa_jax.data import pipeline
from cjepa_jax.errors import require
from cjepa_jax.evaluate import features, masks
from cjepa_jax.evaluate import segmentation_heads as heads
from cjepa_jax.evaluate.base import Evaluator, Rows
from cjepa_jax.evaluate.frozen import PIXELS, Frozen
from cjepa_jax.models.vit import normalise, patchify
from cjepa_jax.settings import setting
from cjepa_jax.train import sharding

_CONVOLUTIONS = {"linear": 0, "convolutional": 2}  # of each head
_SHOWN = 6  # images in the picture
_ROUND_TO = 4 * heads.ROWS  # pixels; images of much the same size share a program
States = dict[tuple[str, str], heads.State]  # (encoder, head) -> what was trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
    """Trains a linear and a convolutional head on the features of patches, and segments the validation images.

    Batch norm, AdamW, its rates and the length follow DINOv2 (arXiv 2304.07193), whose exact numbers were not checked.
    """

    data_dir: str = setting("", "The folder that holds images and annotations, in ADE20K's layout.")
    classes: int = setting(150, "Number of classes.", within="[2, 32767]")
    first_class: int = setting(
        1, "Value of the first class in the masks; the other classes follow it.", within="[0, 65535]"
    )
    ignored: tuple[int, ...] = setting(
        (0,), "Values in the masks of pixels that do not count; () where all do.", within="[0, 65535]"
    )
    steps: int = setting(40_000, "Length of the training.", within="[1, 1e9]")
    batch_size: int = setting(
        16, "Images of a step; rounded up to a multiple of the devices, which share them.", within="[1, 65536]"
    )
    learning_rate: float = setting(
        1e-3, "Of AdamW, at its highest; it rises for 3.75 % of the steps, then falls to 0.", within="(0, 1000]"
    )
    weight_decay: float = setting(1e-4, "It is multiplied by the learning rate.", within="[0, 1000]")

    name: ClassVar[str] = "segmentation"
    needs_labels: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    reads_data: ClassVar[bool] = False
    pictures: ClassVar[tuple[str, ...]] = ("segmentation.png",)

    @property
    def _values(self) -> masks.Values:
        return masks.Values(self.classes, self.first_class, self.ignored)

    def check(self, frozen: Frozen) -> None:
        """Raises UserError for images and masks that do not fit together; reads every one of them."""
        empty = "segmentation.data_dir is empty: --config.segmentation.data_dir=FOLDER names the folder of images"
        require(bool(self.data_dir), f"{empty} and annotations")
        both = [value for value in self.ignored if value in self._values]
        require(
            not both,
            f"segmentation.ignored holds {both[0] if both else ''}, which is a class by segmentation.first_class = "
            f"{self.first_class} and segmentation.classes = {self.classes}; where masks hold 0 to C - 1 and 255 is "
            'ignored, give first_class=0 and ignored="(255,)"',
        )
        there: dict[str, set[int]] = {}
        for split in ("training", "validation"):
            pairs = masks.find(self.data_dir, split)
            with concurrent.futures.ThreadPoolExecutor(pipeline.threads(frozen.data)) as pool:
                found = pool.map(functools.partial(masks.inspect, values=self._values), pairs)
                bar = frozen.progress(f"checking {split} images and masks", found, total=len(pairs), unit="images")
                there[split] = set().union(*bar)
            require(bool(there[split]), f"segmentation.data_dir = {self.data_dir!r}: no {split} mask holds a class")
        require(
            not there["training"].isdisjoint(there["validation"]),
            f"segmentation.data_dir = {self.data_dir!r}: the training masks and the validation masks have no class in "
            "common",
        )

    def run(self, frozen: Frozen, stem: epath.Path | None) -> Rows:
        """Gives mIoU, accuracy of pixels and IoU of each class of both heads on every encoder.

        Draws STEM.segmentation.png. Raises UserError where a training diverges.
        """
        encode = {name: _encoder(frozen, name) for name in frozen.params}
        states = self._train(frozen, encode)
        pairs = masks.find(self.data_dir, "validation")
        shown = {round(i) for i in np.linspace(0, len(pairs) - 1, min(_SHOWN, len(pairs)))}
        columns: dict[str, list[np.ndarray]] = {}
        counts = {key: np.zeros((self.classes, self.classes), np.int64) for key in states}
        with frozen.progress("segmented validation images", total=len(pairs), unit="images") as bar:
            for i, (truth, found, pixels) in enumerate(self._segment(frozen, encode, states, pairs)):
                for key, classes in found.items():
                    counts[key] += heads.confusion(truth, classes, self.classes)
                if i in shown:
                    size = truth.shape[::-1]
                    picture = Image.fromarray(pixels.squeeze()).resize(size, Image.Resampling.BILINEAR)
                    columns.setdefault("image", []).append(np.asarray(picture).reshape(*truth.shape, -1))
                    columns.setdefault("truth", []).append(_colours(truth))
                    for head in _CONVOLUTIONS:
                        drawn = _colours(found[frozen.judged, head])
                        columns.setdefault(f"{frozen.judged},\n{head} head", []).append(drawn)
                bar.update()
        if stem is not None and jax.process_index() == 0:
            title = "Images, their classes, and what the heads found; black is ignored"
            plots.side_by_side(columns, stem.with_name(f"{stem.name}.segmentation.png"), title=title)
        rows: Rows = {name: {"images": len(pairs)} for name in frozen.params}
        for (name, head), matrix in counts.items():
            miou, accuracy, each = heads.scores(matrix)
            rows[name] |= {f"{head} mIoU": miou, f"{head} pixel accuracy": accuracy}
            values = {str(self.first_class + i): iou for i, iou in enumerate(each)}
            rows[name].setdefault("IoU of classes", {})[head] = values
        return rows

    def notes(self, rows: Rows) -> list[str]:
        """Says how many classes the means are over, where it is not all."""
        missing = [
            f"{name}, {head}: {absent} of {len(classes)} classes are neither there nor found, and not in the mean"
            for name, row in rows.items()
            for head, classes in row["IoU of classes"].items()
            if (absent := sum(iou is None for iou in classes.values()))
        ]
        return missing

    def _size(self, frozen: Frozen) -> int:
        return math.ceil(self.batch_size / frozen.mesh.size) * frozen.mesh.size

    def _train(self, frozen: Frozen, encode: dict[str, Callable[..., jax.Array]]) -> States:
        """Trains all heads on the same batches; the features of a batch are there for its step only."""
        optimizer = heads.adamw(self.steps, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        grid = grid_of(frozen.data.image_shape, frozen.model.patch_size)
        states: States = {}
        losses: dict[tuple[str, str], jax.Array] = {}
        batches = zip(range(self.steps), self._batches(frozen), strict=False)
        for _, (images, truth) in frozen.progress("steps of the heads", batches, total=self.steps, unit="steps"):
            jax.block_until_ready(losses)  # one batch ahead of the devices is enough
            images, truth = jax.device_put((images, truth), sharding.batch(frozen.mesh))
            for name, params in frozen.params.items():
                found = encode[name](params, images)
                for kind, convolutions in _CONVOLUTIONS.items():
                    head = heads.Head(self.classes, convolutions)
                    if (name, kind) not in states:
                        rng = jax.random.key(frozen.seed)
                        state = heads.init(head, width=found.shape[-1], optimizer=optimizer, rng=rng)
                        states[name, kind] = jax.device_put(state, sharding.replicated(frozen.mesh))
                    states[name, kind], losses[name, kind] = heads.train_step(
                        states[name, kind], found, truth, grid=grid, head=head, optimizer=optimizer
                    )
        for (name, kind), value in losses.items():
            require(
                bool(jnp.isfinite(value)),
                f"segmentation: the loss of the {kind} head on {name} is {float(value)}: "
                f"lower segmentation.learning_rate = {self.learning_rate}",
            )
        return states

    def _batches(self, frozen: Frozen) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images [B, H, W, C] uint8 and their classes [B, H, W] int16 without end, in a fixed random order."""
        pairs, size = masks.find(self.data_dir, "training"), self._size(frozen)
        load = _LoadAndFlip(pairs, self._values, frozen.data.image_shape[::-1], frozen.data.channels)
        indices = grain.MapDataset.range(len(pairs)).seed(frozen.seed).shuffle().repeat()
        options = grain.ReadOptions(num_threads=pipeline.threads(frozen.data), prefetch_buffer_size=2 * size)
        return iter(indices.random_map(load).to_iter_dataset(options).batch(size))

    def _segment(
        self,
        frozen: Frozen,
        encode: dict[str, Callable[..., jax.Array]],
        states: States,
        pairs: list[masks.Pair],
    ) -> Iterator[tuple[np.ndarray, dict[tuple[str, str], np.ndarray], np.ndarray]]:
        """Yields of each pair the classes [H, W], those found by (encoder, head), and the image as it was encoded."""
        size, shape = self._size(frozen), frozen.data.image_shape
        grid = grid_of(shape, frozen.model.patch_size)
        everywhere = sharding.batch(frozen.mesh)

        def load(i: int) -> tuple[np.ndarray, np.ndarray]:
            image = masks.read_frame(pairs[i].image, shape[::-1], frozen.data.channels)
            return image, masks.read_classes(pairs[i].mask, self._values)

        options = grain.ReadOptions(num_threads=pipeline.threads(frozen.data), prefetch_buffer_size=2 * size)
        read = grain.MapDataset.range(len(pairs)).map(load).to_iter_dataset(options)
        for batch in read.batch(size, drop_remainder=False, batch_fn=list):
            images, truths = zip(*batch, strict=True)
            # What fills up the batch, and the images to one size, is nothing.
            height, width = (max(math.ceil(n / _ROUND_TO) * _ROUND_TO for n in sides) for sides in _sides(truths))
            rows, columns = (np.zeros((size, *sides), np.float32) for sides in zip((height, width), grid, strict=True))
            padded = np.zeros((size, *images[0].shape), np.uint8)
            for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
                padded[i] = image
                rows[i, : truth.shape[0]] = heads.bilinear(truth.shape[0], grid[0])
                columns[i, : truth.shape[1]] = heads.bilinear(truth.shape[1], grid[1])
            padded, rows, columns = jax.device_put((padded, rows, columns), everywhere)
            found: dict[tuple[str, str], Any] = {}
            for name, params in frozen.params.items():
                seen = encode[name](params, padded)
                for kind, convolutions in _CONVOLUTIONS.items():
                    head = heads.Head(self.classes, convolutions)
                    found[name, kind] = jax.device_get(
                        heads.predict(states[name, kind], seen, rows, columns, grid=grid, head=head)
                    )
            for i, (image, truth) in enumerate(zip(images, truths, strict=True)):
                y, x = truth.shape
                yield truth, {key: classes[i, :y, :x] for key, classes in found.items()}, image


def _sides(truths: tuple[np.ndarray, ...]) -> tuple[list[int], list[int]]:
    return [truth.shape[0] for truth in truths], [truth.shape[1] for truth in truths]


@dataclasses.dataclass(frozen=True)
class _LoadAndFlip(grain.transforms.RandomMap):
    """Maps the number of a pair to its image [H, W, C] and classes [H, W], as a whole, mirrored half of the times."""

    pairs: list[masks.Pair]
    values: masks.Values
    size: tuple[int, int]  # width and height
    channels: int

    def random_map(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pairs[index]
        image = masks.read_frame(pair.image, self.size, self.channels)
        classes = Image.fromarray(masks.read_classes(pair.mask, self.values).astype(np.int32))
        truth = np.asarray(classes.resize(self.size, Image.Resampling.NEAREST)).astype(np.int16)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
        return np.ascontiguousarray(image[:, flip]), np.ascontiguousarray(truth[:, flip])


def _encoder(frozen: Frozen, name: str) -> Callable[..., jax.Array]:
    """Makes a function of parameters and images that gives the features of patches [B, N, D], or their pixels."""
    model, data = frozen.model, frozen.data
    options = {"image_shape": data.image_shape, "trained_shape": frozen.trained_shape}
    apply = features.patch_features(model, **options, mean=data.mean, std=data.std)
    if name == PIXELS:

        def apply(params: features.Params, images: jax.Array) -> jax.Array:
            return patchify(normalise(images, mean=data.mean, std=data.std), model.patch_size)

    split = sharding.batch(frozen.mesh)
    return cast(Callable[..., jax.Array], jax.jit(apply, in_shardings=(None, split), out_shardings=split))


def _colours(classes: np.ndarray) -> np.ndarray:
    """Gives a colour to each pixel [H, W, 3] in [0, 1] by its class; black to what is ignored."""
    hue = (classes * 0.618034) % 1  # the golden ratio sets the hues of neighbours far apart
    drawn = colormaps["hsv"](hue)[..., :3] * (1 - 0.3 * (classes % 3)[..., None] / 2)
    return np.where(classes[..., None] >= 0, drawn, 0.0)
