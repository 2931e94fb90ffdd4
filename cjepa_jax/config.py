"""Every setting, its meaning and its checks.

A config file (`configs/*.py`) is one `ml_collections.ConfigDict` whose groups
and keys are exactly the fields below: there are no hidden defaults. `parsing.parse`
turns it into these frozen dataclasses once. Checks that need only one group live
here; checks that need the grid, the data or the devices live where those are known.
"""

import dataclasses
import difflib
import typing
from typing import Literal


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the key or file and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_line(message: object) -> str:
    """A text, or an error's message, without line breaks."""
    return " ".join(str(message).split())


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A closing phrase for an error about an unknown name: the nearest known one, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def at_least(group: str, minimum: float, **values: float) -> None:
    """Raises UserError for a value below the minimum; `group` is the keys' group."""
    for key, value in values.items():
        require(value >= minimum, f"{group}.{key} must be at least {minimum}, got {value}")


def _interval(group: str, low: float, high: float, **values: tuple[float, float]) -> None:
    for key, (start, end) in values.items():
        require(
            low < start <= end <= high,
            f"{group}.{key} must be an increasing pair in ({low}, {high}], got {(start, end)}",
        )


Source = Literal["digits", "npz", "folder", "tfds", "clevr_count", "clevr_distance"]  # see data/sources.py


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and how they are cropped."""

    source: Source
    name: str  # tfds: its name, e.g. "imagenet2012"; "" where data_dir is itself a data set, as `prepare` writes it
    data_dir: str  # npz: the file; folder: the folder; others: where TFDS looks, "" is ~/tensorflow_datasets
    train_split: str  # TFDS syntax, slices too: "train", "train[:80%]"
    test_split: str  # images for the probes
    image_size: int  # pixels a side after cropping
    crop_scale: tuple[float, float]  # random-resized crop: share of the image's area
    crop_ratio: tuple[float, float]  # and its aspect ratio, drawn in log space
    flip: float  # probability of a horizontal flip
    color: float  # strength of SimCLR's colour distortion, 1 is SimCLR's own
    blur: float  # probability of SimCLR's Gaussian blur
    mean: tuple[float, ...]  # per channel, of values in [0, 1]; its length is the channel count
    std: tuple[float, ...]
    batch_size: int  # global, over all devices and hosts
    decoder: Literal["fast", "pillow"]  # simplejpeg and OpenCV, or exactly as torchvision, slower
    threads: int  # decoding threads a process, 0: one a core; no influence on the batches
    prefetch: int  # batches read ahead a process
    max_bad_fraction: float  # of the images that cannot be read and are replaced; above it the run stops

    def __post_init__(self):
        at_least("data", 1, image_size=self.image_size, prefetch=self.prefetch)
        at_least("data", 0, color=self.color, threads=self.threads)
        at_least("data", 2, batch_size=self.batch_size)
        _interval("data", 0.0, 1.0, crop_scale=self.crop_scale)
        _interval("data", 0.0, float("inf"), crop_ratio=self.crop_ratio)
        require(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3),
            f"data.mean and data.std must both have 1 or 3 numbers, got {self.mean} and {self.std}",
        )
        require(min(self.std) > 0, f"data.std must be positive, got {self.std}")
        for key in ("flip", "blur", "max_bad_fraction"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"data.{key} must be in [0, 1], got {value}")
        require(self.color == 0 or self.channels == 3, "data.color needs RGB: data.mean and data.std of 3 numbers")

    @property
    def channels(self) -> int:
        """1 is greyscale, 3 is RGB."""
        return len(self.mean)


@dataclasses.dataclass(frozen=True)
class Model:
    """The encoder (METHOD: a plain pre-norm ViT without class token)."""

    size: str  # Ti, S, B, L, H, g, or WIDTHxDEPTHxHEADS[xMLP_RATIO], e.g. "64x3x4"
    patch_size: int
    init: Literal["normal", "fan_in"]  # std 0.02, or 0.02 * sqrt(768 / fan_in)
    dtype: Literal["bfloat16", "float32"]  # of the matrix products; parameters and losses stay float32
    layers: Literal["unrolled", "scanned"]  # every layer compiled, or one in a loop: quicker to compile, slower to run
    remat: Literal["none", "dots", "full"]  # computed anew in the backward pass, to save memory: all but Dense, or all

    def __post_init__(self):
        at_least("model", 1, patch_size=self.patch_size)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The narrow ViT that predicts hidden blocks; it has the encoder's number of heads."""

    width: int
    depth: int

    def __post_init__(self):
        at_least("predictor", 1, width=self.width, depth=self.depth)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Multi-block masking; lengths are static, a validity mask marks what is padding."""

    recipe: Literal["released", "corrected"]  # I-JEPA's code as released, or as its paper describes it
    targets: int  # blocks an image
    target_scale: tuple[float, float]  # share of the patches in a block
    target_aspect: tuple[float, float]  # height / width
    context_scale: tuple[float, float]  # share of the patches in the (square) context block
    min_keep: int  # fewest context patches that an image may be left with
    context_tokens: int  # static length of the context
    keep: Literal["random", "raster"]  # which context tokens stay when there are more

    def __post_init__(self):
        at_least("mask", 2, targets=self.targets)
        at_least("mask", 1, min_keep=self.min_keep)
        _interval("mask", 0.0, 1.0, target_scale=self.target_scale, context_scale=self.context_scale)
        _interval("mask", 0.0, float("inf"), target_aspect=self.target_aspect)
        require(
            self.context_tokens >= self.min_keep,
            f"mask.context_tokens must be at least mask.min_keep = {self.min_keep}, got {self.context_tokens}",
        )


@dataclasses.dataclass(frozen=True)
class Loss:
    """The prediction loss."""

    kind: Literal["smooth_l1", "l2"]


@dataclasses.dataclass(frozen=True)
class Vicreg:
    """The regulariser: weight * (invariance * sim + variance * std + covariance * cov)."""

    weight: float  # 0 is I-JEPA
    views: Literal["target_blocks", "context_target"]  # the paper's Algorithm 1, or its pseudocode
    invariance: float
    variance: float
    covariance: float
    gamma: float  # the std that the variance term asks of each dimension
    eps: float
    projector: tuple[int, ...]  # () is the identity; else the widths of an MLP with batch norm

    def __post_init__(self):
        at_least(
            "vicreg",
            0,
            weight=self.weight,
            invariance=self.invariance,
            variance=self.variance,
            covariance=self.covariance,
            gamma=self.gamma,
            eps=self.eps,
        )
        require(self.eps > 0, f"vicreg.eps must be positive, got {self.eps}")  # else a collapsed batch has no gradient
        at_least("vicreg", 1, **{f"projector[{i}]": w for i, w in enumerate(self.projector)})


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW; the learning rate warms up linearly and decays on a cosine, weight decay rises on one."""

    epochs: float
    warmup_epochs: float
    learning_rate_start: float
    learning_rate: float
    learning_rate_end: float
    weight_decay_start: float
    weight_decay_end: float
    beta1: float
    beta2: float
    eps: float

    def __post_init__(self):
        fields = dataclasses.asdict(self)
        at_least("optim", 0, **fields)
        require(self.epochs > 0, f"optim.epochs must be positive, got {self.epochs}")
        require(
            self.warmup_epochs < self.epochs,
            f"optim.warmup_epochs must be below optim.epochs = {self.epochs}, got {self.warmup_epochs}",
        )
        for key in ("beta1", "beta2"):
            require(fields[key] < 1, f"optim.{key} must be below 1, got {fields[key]}")


@dataclasses.dataclass(frozen=True)
class Ema:
    """Momentum of the target encoder, linear from start to end; 0 and 0 switch the average off."""

    start: float
    end: float

    def __post_init__(self):
        for key, value in dataclasses.asdict(self).items():
            require(0 <= value <= 1, f"ema.{key} must be in [0, 1], got {value}")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices share the parameters; the batch is split over all of them in any case."""

    fsdp: int  # devices that hold one copy of the parameters between them; the further copies are data parallel
    parameters: Literal["replicated", "zero1", "fsdp"]  # gathered never, whole once a step, or a layer at a time

    def __post_init__(self):
        at_least("mesh", 1, fsdp=self.fsdp)
        require(
            (self.parameters == "replicated") == (self.fsdp == 1),
            f"mesh.fsdp = {self.fsdp} does not go with mesh.parameters = {self.parameters!r}: replicated is 1, the "
            "others more",
        )


def check_remat(mesh: Mesh, remat: str) -> None:
    """Raises UserError where the backward pass would hold all parameters that the mesh cuts."""
    require(
        mesh.parameters != "fsdp" or remat != "none",
        "mesh.parameters = 'fsdp' wants model.remat = 'dots' or 'full': else the backward pass would keep every "
        "layer's gathered parameters",
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """Progress bar, metrics.jsonl and TensorBoard."""

    every: int  # steps between log lines

    def __post_init__(self):
        at_least("log", 1, every=self.every)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are written, and which stay."""

    every: int  # steps between checkpoints; the last step is always saved
    keep_last: int
    keep_every: int  # checkpoints at multiples of this step stay for good; 0: none

    def __post_init__(self):
        at_least("checkpoint", 1, every=self.every, keep_last=self.keep_last)
        at_least("checkpoint", 0, keep_every=self.keep_every)
        require(
            self.keep_every % self.every == 0,
            f"checkpoint.keep_every must be a multiple of checkpoint.every = {self.every}, got {self.keep_every}",
        )


@dataclasses.dataclass(frozen=True)
class Eval:
    """kNN and linear probes during and after pre-training."""

    every: int  # steps between probes during training; 0: none, and no table at the end
    images: int  # of each split, at most: a random sample, always the same; 0: all
    crop_fraction: float  # side of the central crop over the short side of the image
    neighbours: int  # k of kNN
    shots: int  # labels a class of the few-label probe
    draws: int  # of the few labels

    def __post_init__(self):
        at_least("eval", 0, every=self.every, images=self.images)
        require(0 < self.crop_fraction <= 1, f"eval.crop_fraction must be in (0, 1], got {self.crop_fraction}")
        at_least("eval", 1, neighbours=self.neighbours, shots=self.shots, draws=self.draws)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: int
    data: Data
    model: Model
    predictor: Predictor
    mask: Mask
    loss: Loss
    vicreg: Vicreg
    optim: Optim
    ema: Ema
    mesh: Mesh
    log: Log
    checkpoint: Checkpoint
    eval: Eval

    def __post_init__(self):
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
        check_remat(self.mesh, self.model.remat)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.data.image_size // self.model.patch_size
