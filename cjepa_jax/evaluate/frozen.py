"""Frozen encoders, and what evaluators read of them."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tqdm
from etils import epath
from jaxtyping import Int, UInt8

from cjepa_jax import pretrained
from cjepa_jax.config import Data, Mesh, Model
from cjepa_jax.data import decode, pipeline, sources
from cjepa_jax.errors import require
from cjepa_jax.evaluate.features import Apply, Extractor, Params, encoder_for, mean_features, pixels
from cjepa_jax.evaluate.sets import Labelled, Splits, check_classes, lacking
from cjepa_jax.models.vit import parse_size
from cjepa_jax.train import sharding

TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "raw pixels"  # names of encoders
PARAMETERS, AVERAGE = "parameters", "average"  # names of a fine-tuned network's encoders


class Origin(NamedTuple):
    """The checkpoint that frozen encoders come from."""

    workdir: epath.Path
    encoder: str  # the judged one, a key of pretrained.ENCODERS
    networks: pretrained.Pretrained

    @property
    def checkpoint(self) -> epath.Path:
        """Returns the folder of the checkpoint itself."""
        return self.workdir / "checkpoints" / str(self.networks.step)


@dataclasses.dataclass
class Frozen:
    """Encoders whose parameters stay as they are; their features are computed when they are first asked for.

    The first encoder is the one that is judged; the others are there to compare with.
    """

    params: Mapping[str, Params]  # encoder's name -> its parameters, whole on every device; raw pixels have none
    extractor: Extractor  # knows the encoders by the same names
    model: Model
    trained_shape: tuple[int, int]  # height and width of the images in training, in pixels
    data: Data
    crop_fraction: float  # side of the central crop over that of the largest one of its shape
    seed: int = 0
    images: int = 0  # of each split, at most: a random sample, which is always the same; 0: all
    heads: Mapping[str, Params] = dataclasses.field(default_factory=dict)  # encoder's name -> kernel [D, C], bias [C]
    readers: dict[str, pipeline.Reader] = dataclasses.field(default_factory=dict)  # of the splits used so far
    origin: Origin | None = None  # None where the encoders are still in training

    @property
    def judged(self) -> str:
        """Returns the name of the encoder that is judged."""
        return next(iter(self.params))

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """Returns the devices that share the work."""
        return self.extractor.mesh

    @property
    def train(self) -> pipeline.Reader:
        """Returns the reader of the training split, which need not have labels."""
        return self._reader("train")

    @property
    def test(self) -> pipeline.Reader:
        """Returns the reader of the test split."""
        return self._reader("test")

    def _reader(self, split: Literal["train", "test"]) -> pipeline.Reader:
        if split not in self.readers:
            name = self.data.train_split if split == "train" else self.data.test_split
            self.readers[split] = pipeline.Reader(sources.load(self.data, name), self.data)
        return self.readers[split]

    def sampled(self, reader: pipeline.Reader, images: int = 0) -> list[int]:
        """Returns the ascending indices of the images of a split that are used: `images` at most, or `self.images`."""
        count = len(reader.source)
        used = images or self.images or count
        return [int(i) for i in np.sort(np.random.default_rng(0).permutation(count)[:used])]

    def sample(self, reader: pipeline.Reader, count: int) -> tuple[Int[np.ndarray, " n"], dict[str, Labelled]]:
        """Returns a random sample of the readable images of a split: n ascending indices, and features [n, D] of each.

        Of `count` images at most, those that cannot be read are left out. Raises UserError where none can be read.
        """
        view = pipeline.central_view(reader, crop_fraction=self.crop_fraction)
        read: list[int] = []

        def noted(index: int) -> tuple[decode.Crop, int | None]:
            found = view(index)
            read.append(index)
            return found

        chosen = np.sort(np.random.default_rng(self.seed).permutation(len(reader.source))[:count]).tolist()
        which = "test" if reader is self.readers.get("test") else "training"
        with self.progress(f"features of {which} images", total=len(chosen), unit="images") as bar:
            features = self.extractor.split(self.params, reader, chosen, noted, seen=bar.update)
        require(bool(read), f"none of {len(chosen)} {which} images can be read")
        return np.sort(read), {name: found.last(1) for name, found in features.items()}

    def spread_images(self, count: int) -> UInt8[np.ndarray, "n H W C"]:
        """Reads some readable images of the test split, evenly spread over it. Raises UserError where none can be."""
        reader = self.test
        wanted = min(count, len(reader.source))
        indices = np.linspace(0, len(reader.source) - 1, wanted).round().astype(int)
        view = pipeline.central_view(reader, crop_fraction=self.crop_fraction)
        ((images, labels),) = pipeline.labelled_batches(reader, indices.tolist(), size=wanted, view=view)
        images = images[labels != pipeline.NO_IMAGE]
        require(len(images) > 0, f"data.test_split = {self.data.test_split!r}: none of {wanted} images can be read")
        return images

    def progress(self, what: str, over: Iterable[Any] | None = None, *, total: int, unit: str) -> tqdm.tqdm:
        """Makes a bar of progress, which also times; where stderr is not a terminal it is renewed once a minute.

        It gives the elements of `over`, or is told of progress by `update`. There is no bar while the encoders are
        still in training.
        """
        interval = 0.1 if sys.stderr.isatty() else 60.0
        hidden = self.origin is None or jax.process_index() != 0
        return tqdm.tqdm(
            over,
            desc=what,
            total=total,
            unit=f" {unit}",
            disable=hidden,
            mininterval=interval,
            maxinterval=max(interval, 10),
        )

    @functools.cached_property
    def train_features(self) -> dict[str, Labelled]:
        """Returns each encoder's features [n, layers, D] of central crops of the training images."""
        return self._features(self.train, "training")

    @functools.cached_property
    def test_features(self) -> dict[str, Labelled]:
        """Returns each encoder's features [n, layers, D] of central crops of the test images."""
        return self._features(self.test, "test")

    def _features(self, reader: pipeline.Reader, which: str) -> dict[str, Labelled]:
        view = pipeline.central_view(reader, crop_fraction=self.crop_fraction)
        indices = self.sampled(reader)
        with self.progress(f"features of {which} images", total=len(indices), unit="images") as bar:
            return self.extractor.split(self.params, reader, indices, view, seen=bar.update)

    def splits(self, *, layers: int = 1) -> dict[str, Splits]:
        """Returns each encoder's features of both splits, those of its last `layers` blocks side by side.

        Raises UserError where a split has no labels; and, for a checkpoint, where some of its images have none, or
        where the training images lack classes of the others.
        """
        self.check_labels()
        train, test = self.train_features, self.test_features
        names = self._names
        if self.origin:
            labels = train[self.judged].labels, test[self.judged].labels
            check_classes(*labels, names=names, classes=self.train.source.classes)
        else:  # a training is not to be stopped by a sample that lacks a class, or some labels
            train, test = (labelled(split, name) for split, name in zip((train, test), names, strict=True))
        return {name: Splits(train[name].last(layers), test[name].last(layers)) for name in self.params}

    @property
    def classes(self) -> int:
        """Returns how many classes the labels tell apart."""
        return len(self.train.source.classes)

    def check_labels(self) -> None:
        """Raises UserError where a split has no labels, or where the splits number their classes differently."""
        check_labels(self.data, self.train.source, self.test.source)

    def check_classes(self) -> None:
        """Raises UserError as `splits` does for labels, as far as they are known without the images.

        Says, too, which classes no test image has.
        """
        readers = self.train, self.test
        if not all(reader.source.label for reader in readers):
            return
        train, test = (
            np.array([-1 if label is None else label for label in reader.source.labels()])[self.sampled(reader)]
            for reader in readers
        )
        check_classes(train, test, names=self._names, classes=self.train.source.classes)
        if lost := lacking(test, train, self.train.source.classes):
            print(f"warning: {self._names[1]} lacks {lost}, which are not judged", file=sys.stderr, flush=True)

    @property
    def _names(self) -> tuple[str, str]:
        return f"data.train_split = {self.data.train_split!r}", f"data.test_split = {self.data.test_split!r}"


def labelled(split: dict[str, Labelled], name: str) -> dict[str, Labelled]:
    """Leaves out the images without a label of each encoder's features. Raises UserError where that is all of them."""
    (labels, *_) = (images.labels for images in split.values())
    kept = np.flatnonzero(labels >= 0)
    require(len(kept) > 0, f"{name}: none of {len(labels)} images has a label; eval.source names others to judge by")
    return split if len(kept) == len(labels) else {encoder: images.take(kept) for encoder, images in split.items()}


def check_labels(data: Data, train: sources.Source, test: sources.Source) -> None:
    """Raises UserError where a split has no labels, or where the splits number their classes differently."""
    for key, source in (("train_split", train), ("test_split", test)):
        require(
            bool(source.classes),
            f"data.{key} = {getattr(data, key)!r} has no labels; the methods collapse, attention, neighbours, "
            "map, davis, segmentation and decoder need none, and eval.every=0 switches evaluation during training off",
        )
    require(
        len(train.classes) > 1,
        f"data.train_split = {data.train_split!r} has one class only, {train.classes[0]!r}: nothing can be told apart",
    )
    require(
        train.classes[: len(test.classes)] == test.classes,
        f"data.test_split = {data.test_split!r} has other classes than data.train_split; "
        "give splits with the same ones",
    )
    for key, source in (("train_split", train), ("test_split", test)):
        require(
            source.is_labelled(),
            f"data.{key} = {getattr(data, key)!r} names classes, but none of its images has a label; name a split with "
            "labels, or let eval.every=0 switch evaluation during training off",
        )


def warn_of_same_images(data: Data, train: sources.Source, test: sources.Source) -> None:
    """Says where both splits are the same images, so that nothing is held out."""
    same = data.train_split == data.test_split or train.fingerprint == test.fingerprint
    if same and jax.process_index() == 0:
        text = f"warning: data.test_split = {data.test_split!r} are the images of data.train_split: "
        print(f"{text}the accuracies are not those of held-out images", file=sys.stderr, flush=True)


def from_checkpoint(
    checkpoint: epath.Path,
    encoder: str,
    *,
    data: Data,
    crop_fraction: float,
    seed: int = 0,
    baselines: bool = True,
    layers: int = 1,
) -> Frozen:
    """Loads an encoder of a checkpoint onto all devices; of a fine-tuned network also the moving average, and heads.

    layers: how many last blocks have features, fewer where the encoder has fewer. baselines: an untrained encoder and
    raw pixels are judged, too. Raises UserError for a checkpoint, or settings, that cannot be judged.
    """
    workdir, saved = pretrained.describe(checkpoint)
    wanted = _networks(checkpoint, encoder, saved)
    networks = pretrained.load(checkpoint, [part for pair in wanted.values() for part in pair])
    model, trained_shape = networks.model, networks.image_shape
    built = encoder_for(model, image_shape=data.image_shape, trained_shape=trained_shape)
    patches = jax.ShapeDtypeStruct((1, math.prod(built.grid), model.patch_size**2 * data.channels), np.float32)
    init = functools.partial(built.init, jax.random.key(seed))
    shapes = jax.eval_shape(init, patches)["params"]
    for part, *_ in wanted.values():
        pretrained.check(networks.params[part], shapes, f"checkpoint {checkpoint}: its {part}")

    mesh = sharding.make_mesh(Mesh(fsdp=1, parameters="replicated"))
    apply = mean_features(model, data, trained_shape=trained_shape, layers=min(layers, parse_size(model.size).depth))
    encoders: dict[str, Apply] = dict.fromkeys(wanted, apply)
    params: dict[str, Any] = {name: networks.params[part] for name, (part, *_) in wanted.items()}
    if baselines:
        encoders |= {UNTRAINED: apply, PIXELS: pixels}
        params |= {UNTRAINED: jax.jit(init)(np.zeros(patches.shape, np.float32))["params"], PIXELS: {}}
    return Frozen(
        params={name: jax.device_put(tree, sharding.replicated(mesh)) for name, tree in params.items()},
        extractor=Extractor(encoders, mesh, batch_size=data.batch_size),
        model=model,
        trained_shape=trained_shape,
        data=data,
        crop_fraction=crop_fraction,
        seed=seed,
        heads={name: networks.params[head] for name, (_, *heads) in wanted.items() for head in heads},
        origin=Origin(workdir, encoder, networks),
    )


def _networks(checkpoint: epath.Path, encoder: str, saved: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Lists what to load of a checkpoint: name of an encoder -> its key, and the key of its head, if there is one."""
    has = pretrained.available(checkpoint)
    if encoder != "encoder" or "head" not in has:
        return {TRAINED: (encoder, "head") if "head" in has else (encoder,)}
    found: dict[str, tuple[str, ...]] = {PARAMETERS: ("encoder", "head")}
    if "ema_head" in has and (saved.get("ema.start"), saved.get("ema.end")) != (0, 0):
        found[AVERAGE] = "ema_encoder", "ema_head"
    return found
