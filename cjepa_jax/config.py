"""The settings that all methods share, their meaning, defaults and checks; a method adds its own in its file.

Checks that need only one group live here; checks that need the grid, the data or the devices live where those are
known.
"""

import dataclasses
from typing import ClassVar, Literal

from cjepa_jax.errors import require
from cjepa_jax.settings import group, required, setting

Grid = tuple[int, int]  # rows and columns of patches

SourceKind = Literal[  # see data/sources.py
    "digits", "npz", "folder", "webdataset", "parquet", "tfds", "clevr_count", "clevr_distance", "own"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how they are cropped."""

    source: SourceKind = required("The kind of data set; see docs/data.md.")
    name: str = setting("", "tfds: the set's name, such as imagenet2012; empty where data_dir is itself a data set.")
    data_dir: str = setting(
        "",
        "npz: the file. folder, webdataset, parquet: the folder. Others: where TFDS looks, by default its own.",
    )
    train_split: str = setting("train", "The images to train on, in TFDS' syntax with slices: train[:80%].")
    test_split: str = setting("test", "The images to evaluate on.")
    image_size: int = setting(224, "Pixels per side after cropping, or of height.", within="[1, 8192]")
    image_width: int = setting(
        0, "Pixels of width, where image_size is only the height; 0: the images are square.", within="[0, 8192]"
    )
    crop_scale: tuple[float, float] = setting(
        (0.3, 1.0), "Random-resized crop: its share of the image's area.", within="(0, 1]"
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        "Random-resized crop: its width / height relative to that of the result, drawn uniformly in log space.",
        within="[0.01, 100]",
    )
    flip: float = setting(0.0, "Probability of a horizontal flip.", within="[0, 1]")
    color: float = setting(0.0, "Strength of SimCLR's colour distortion; 1 is SimCLR's own.", within="[0, 10]")
    blur: float = setting(0.0, "Probability of SimCLR's Gaussian blur.", within="[0, 1]")
    mean: tuple[float, ...] = setting(
        (0.485, 0.456, 0.406),
        "Mean of each channel, of values in [0, 1] (divide one of 0 to 255 by 255); one is greyscale, three are RGB.",
        within="[0, 1]",
    )
    std: tuple[float, ...] = setting(
        (0.229, 0.224, 0.225),
        "Standard deviation of each channel, of values in [0, 1] (divide one of 0 to 255 by 255).",
        within="[0.004, 1]",
    )
    batch_size: int = setting(256, "Images of a step, over all devices and hosts.", within="[2, 1048576]")
    decoder: Literal["fast", "pillow"] = setting(
        "fast", "simplejpeg and OpenCV (fast), or the same pixels as torchvision, which is slower (pillow)."
    )
    threads: int = setting(
        0, "Decoding threads of a process, 0: one per core. They have no influence on the batches.", within="[0, 1024]"
    )
    prefetch: int = setting(2, "Batches read ahead by a process.", within="[1, 1024]")
    read_timeout: float = setting(
        1800.0,
        "Seconds after which the run saves and stops where an image's file is not read, as when a network file system "
        "hangs; 0: never.",
        within="[0, 1e9]",
    )
    max_bad_fraction: float = setting(
        0.01, "Share of the images that may be unreadable and are replaced; above it the run stops.", within="[0, 1]"
    )

    def __post_init__(self):
        require(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3),
            f"data.mean and data.std must both have 1 or 3 numbers, got {self.mean} and {self.std}",
        )
        require(self.color == 0 or self.channels == 3, "data.color needs RGB: data.mean and data.std of 3 numbers")

    @property
    def channels(self) -> int:
        """Gives the number of channels: 1 is greyscale, 3 is RGB."""
        return len(self.mean)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Gives height and width of an image in pixels, after cropping."""
        return self.image_size, self.image_width or self.image_size


def grid_of(image_shape: tuple[int, int], patch_size: int) -> Grid:
    """Gives the numbers of rows and columns of whole patches of an image, (height, width)."""
    height, width = image_shape
    return height // patch_size, width // patch_size


def undivided(image_shape: tuple[int, int], patch_size: int) -> str:
    """Names the side of an image, (height, width), that patches do not divide; gives "" where they divide both."""
    height, width = image_shape
    if height % patch_size:
        return f"data.image_size = {height}"
    return f"data.image_width = {width}" if width % patch_size else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder, a plain pre-norm ViT without class token."""

    size: str = setting("B", "Ti, S, B, L, H, g, or WIDTHxDEPTHxHEADS[xMLP_RATIO], such as 64x3x4.")
    patch_size: int = setting(
        16,
        "Pixels per side of a patch; 0: the largest of 16, 8, 4 and 2 that divides the image into 8x8 patches or more.",
        within="[0, 1024]",
    )
    init: Literal["normal", "fan_in"] = setting(
        "normal", "Standard deviation of the kernels: 0.02, or 0.02 * sqrt(768 / fan_in), better at small widths."
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "Type of the matrix products; parameters and losses stay float32."
    )
    layers: Literal["unrolled", "scanned"] = setting(
        "unrolled", "Every layer compiled, or one layer in a loop, which compiles quicker and runs slower."
    )
    attention: Literal["auto", "xla", "fused"] = setting(
        "auto",
        "Fused kernels on TPU and GPU where they can serve and XLA elsewhere, or one everywhere; see docs/speed.md.",
    )
    remat: Literal["none", "dots", "full"] = setting(
        "none", "What the backward pass computes anew to save memory: nothing, all but Dense outputs, or everything."
    )

    patch_follows_image: ClassVar[bool] = True  # what patch_size = 0 means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW: the learning rate warms up linearly, then decays on a cosine; the weight decay follows another cosine."""

    epochs: float = setting(100.0, "Length of the run, in passes over the training images.", within="(0, 1e6]")
    warmup_epochs: float = setting(15.0, "Epochs at the start with a rising learning rate.", within="[0, 1e6]")
    learning_rate_start: float = setting(1e-4, "Learning rate at the first step.", within="[0, 1e30]")
    learning_rate: float = setting(1e-3, "Learning rate at the end of the warm-up.", within="[0, 1e30]")
    learning_rate_end: float = setting(1e-6, "Learning rate at the last step.", within="[0, 1e30]")
    rates_for_batch: int = setting(
        0,
        "Images of the batch that the learning rates are meant for: they are multiplied by the square root of "
        "data.batch_size over this. 0: they are taken as they are.",
        within="[0, 1048576]",
    )
    weight_decay_start: float = setting(
        0.04, "Decay at the first step; it is multiplied by the learning rate.", within="[0, 1000]"
    )
    weight_decay_end: float = setting(0.4, "Decay at the last step.", within="[0, 1000]")
    beta1: float = setting(0.9, "AdamW's momentum.", within="[0, 0.999999]")
    beta2: float = setting(0.999, "AdamW's momentum of the squares.", within="[0, 0.999999]")
    eps: float = setting(1e-8, "AdamW's epsilon.", within="[1e-20, 1]")
    clip_norm: float = setting(
        0.0,
        "The gradient is scaled down where its norm over all parameters is above this; 0: it is never.",
        within="[0, 1e30]",
    )
    frozen: tuple[str, ...] = setting(
        (),
        "Networks, or parts of them, whose parameters stay as they are: encoder, or encoder/embed, or encoder/block00.",
    )
    microbatches: int = setting(
        1,
        "Parts in which a batch goes through the networks, one after another, to save memory. The loss still sees the "
        "whole batch, so the gradient is the same. 0: the fewest with which the compiled step fits into memory.",
        within="[0, 1e6]",
    )
    schedule_offset: int = setting(
        1,
        "Step k, counted from 0, uses the learning rate and weight decay of step k + optim.schedule_offset; 1 is what "
        "I-JEPA's released code does.",
        before=0,
        within="[0, 1]",
    )

    def __post_init__(self):
        require(
            self.warmup_epochs < self.epochs,
            f"optim.warmup_epochs must be below optim.epochs = {self.epochs}, got {self.warmup_epochs}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Momentum of the moving average, linear from start to end; 0 and 0 switch the average off."""

    start: float = setting(0.996, "Momentum at the first step.", within="[0, 1]")
    end: float = setting(1.0, "Momentum at the last step.", within="[0, 1]")
    warmup: bool = setting(
        False, "Whether the momentum of step t, from 0, is (1 + t) / (10 + t) at most, which suits runs of any length."
    )

    @property
    def off(self) -> bool:
        """Tells whether there is no average."""
        return self.start == self.end == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the devices share the parameters; the batch is split over all of them in any case."""

    fsdp: int = setting(
        0,
        "Devices that hold one copy of the parameters between them; further copies are replicas. 0: 16, where the "
        "number of devices is a multiple of that, and else 1.",
        within="[0, 65536]",
    )
    parameters: Literal["replicated", "zero1", "fsdp"] = setting(
        "zero1",
        "Whether parameters are whole everywhere, gathered once a step, or gathered a layer at a time. With mesh.fsdp "
        "= 1 they are whole in any case.",
    )

    def __post_init__(self):
        require(
            self.parameters != "replicated" or self.fsdp <= 1,
            f"mesh.fsdp = {self.fsdp} does not go with mesh.parameters = 'replicated', which shards nothing; use "
            "'zero1' or 'fsdp', or leave mesh.fsdp out",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """How often progress goes to the bar, metrics.jsonl and TensorBoard, and what follows from it."""

    every: int = setting(50, "Steps between log lines.", within="[1, 1e9]")
    to: tuple[Literal["wandb", "mlflow"], ...] = setting(
        (), "Experiment trackers that also get each line; their own environment variables say where it is sent."
    )
    collapse: Literal["warn", "stop", "off"] = setting(
        "warn",
        "What follows when the features have been collapsing for a while: a line, the end of the run, or nothing.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When checkpoints are written, and which stay."""

    every: int = setting(1000, "Steps between checkpoints; the last step is always saved.", within="[1, 1e9]")
    keep_last: int = setting(2, "How many of the newest stay.", within="[1, 1e6]")
    keep_every: int = setting(0, "Checkpoints at multiples of this step stay for good; 0: none.", within="[0, 1e9]")
    keep_best: Literal["", "knn", "logistic", "linear", "top1", "ema_top1"] = setting(
        "",
        "A result of the evaluation during training: the checkpoint of the step where it was highest stays, too, and "
        "each evaluation is at a checkpoint.",
    )
    fall_back: bool = setting(
        False, "Whether a damaged newest checkpoint is set aside and the newest good one used, instead of an error."
    )

    def __post_init__(self):
        require(
            self.keep_every % self.every == 0,
            f"checkpoint.keep_every must be a multiple of checkpoint.every = {self.every}, got {self.keep_every}",
        )


EVALUATED_ON = ("source", "name", "data_dir", "train_split", "test_split")  # settings of Eval that name images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation during training and at its end."""

    every: int = setting(0, "Steps between evaluations; 0: none, and no table at the end.", within="[0, 1e9]")
    evaluators: tuple[str, ...] = setting(("knn", "logistic"), "What is evaluated; see docs/evaluation.md.")
    images: int = setting(
        10_000, "Images of each split, at most: a random sample, always the same; 0: all.", within="[0, 1e9]"
    )
    crop_fraction: float = setting(
        0.875, "Side of the central crop, as a share of the largest one with its aspect ratio.", within="[0.01, 1]"
    )
    source: SourceKind | None = setting(
        None,
        "The kind of data set with labels to evaluate on, where it is not that of `data`. This and the next four "
        "settings are those of `data` where they are None; but with a source given, name and data_dir are empty then.",
    )
    name: str | None = setting(None, "Name of a TFDS set.")
    data_dir: str | None = setting(None, "Where the data set lies.")
    train_split: str | None = setting(None, "The images to learn from.")
    test_split: str | None = setting(None, "The images to evaluate on.")
    neighbours: int = setting(20, "k of the nearest neighbours.", within="[1, 1e6]")
    shots: int = setting(10, "Labelled images per class, where few labels are used.", within="[1, 1e6]")
    draws: int = setting(5, "How many times these few labels are drawn at random.", within="[1, 1000]")

    def data(self, training: Data) -> Data:
        """Returns where the images to evaluate on come from; `training` says so of those that are trained on."""
        given = {name: value for name in EVALUATED_ON if (value := getattr(self, name)) is not None}
        if "source" in given:  # what belongs to another kind of set says nothing about this one
            given = {"name": "", "data_dir": "", **given}
        return dataclasses.replace(training, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment, as far as all methods have it in common; a method's own settings extend it."""

    method: str = setting("cjepa", "What is trained; see docs/methods.md.")
    seed: int = setting(0, "Root of all random draws.", within="[0, 4294967295]")
    data: Data = group(Data, "Where images come from and how they are cropped.")
    model: Model = group(Model, "The encoder, a plain pre-norm ViT without class token.")
    optim: Optim = group(Optim, "AdamW and its schedules.")
    ema: Ema = group(Ema, "Momentum of the moving average, linear from start to end; 0 and 0 switch it off.")
    mesh: Mesh = group(Mesh, "How the devices share the parameters.")
    log: Log = group(Log, "Progress bar, metrics.jsonl and TensorBoard.")
    checkpoint: Checkpoint = group(Checkpoint, "When checkpoints are written, and which stay.")
    eval: Eval = group(Eval, "Evaluation during training and at its end.")

    def __post_init__(self):
        require(
            self.mesh.parameters != "fsdp" or self.model.remat != "none",
            "mesh.parameters = 'fsdp' needs model.remat = 'dots' or 'full': else the backward pass would keep every "
            "layer's gathered parameters",
        )
        if self.model.patch_follows_image and self.model.patch_size == 0:
            data = self.data
            shape = data.image_shape
            fitting = [patch for patch in (16, 8, 4, 2) if min(shape) >= 8 * patch and not undivided(shape, patch)]
            which = f"data.image_size = {data.image_size}"
            which += f" and data.image_width = {data.image_width}" if data.image_width else ""
            require(
                bool(fitting),
                f"model.patch_size = 0: none of 16, 8, 4 and 2 divides {which} into 8x8 patches or more; give an image "
                "size that is a multiple of 16, or the size of a patch",
            )
            # The only setting that follows from another group; from here on it is like one that was given.
            object.__setattr__(self, "model", dataclasses.replace(self.model, patch_size=fitting[0]))

    @property
    def rate_scale(self) -> float:
        """Gives the factor on the learning rates that the size of the batch asks for."""
        meant = self.optim.rates_for_batch
        return (self.data.batch_size / meant) ** 0.5 if meant else 1.0

    @property
    def grid(self) -> Grid:
        """Gives the numbers of rows and columns of patches of an image."""
        return grid_of(self.data.image_shape, self.model.patch_size)
