"""The settings that all methods share, their meaning, defaults and checks; a method adds its own in its file.

Checks that need only one group live here; checks that need the grid, the data or the devices live where those are
known.
"""

import dataclasses
from typing import Literal

from cjepa_jax.errors import at_least, interval, require
from cjepa_jax.settings import group, required, setting

SourceKind = Literal["digits", "npz", "folder", "tfds", "clevr_count", "clevr_distance"]  # see data/sources.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how they are cropped."""

    source: SourceKind = required("The kind of data set; see docs/data.md.")
    name: str = setting("", "tfds: the set's name, such as imagenet2012; empty where data_dir is itself a data set.")
    data_dir: str = setting(
        "", "npz: the file. folder: the folder. Others: where TFDS looks, by default its own place."
    )
    train_split: str = setting("train", "The images to train on, in TFDS' syntax with slices: train[:80%].")
    test_split: str = setting("test", "The images to judge by.")
    image_size: int = setting(224, "Pixels a side after cropping.")
    crop_scale: tuple[float, float] = setting((0.3, 1.0), "Random-resized crop: its share of the image's area.")
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "And its aspect ratio, drawn in log space.")
    flip: float = setting(0.0, "Probability of a horizontal flip.")
    color: float = setting(0.0, "Strength of SimCLR's colour distortion; 1 is SimCLR's own.")
    blur: float = setting(0.0, "Probability of SimCLR's Gaussian blur.")
    mean: tuple[float, ...] = setting(
        (0.485, 0.456, 0.406), "Mean of each channel, of values in [0, 1]; one number is greyscale, three are RGB."
    )
    std: tuple[float, ...] = setting((0.229, 0.224, 0.225), "Standard deviation of each channel.")
    batch_size: int = setting(256, "Images of a step, over all devices and hosts.")
    decoder: Literal["fast", "pillow"] = setting(
        "fast", "simplejpeg and OpenCV, or exactly as torchvision, which is slower."
    )
    threads: int = setting(0, "Decoding threads of a process, 0: one a core. They have no influence on the batches.")
    prefetch: int = setting(2, "Batches read ahead by a process.")
    max_bad_fraction: float = setting(
        0.01, "Share of the images that may be unreadable and are replaced; above it the run stops."
    )

    def __post_init__(self):
        at_least("data", 1, image_size=self.image_size, prefetch=self.prefetch)
        at_least("data", 0, color=self.color, threads=self.threads)
        at_least("data", 2, batch_size=self.batch_size)
        interval("data", 0.0, 1.0, crop_scale=self.crop_scale)
        interval("data", 0.0, float("inf"), crop_ratio=self.crop_ratio)
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
        """Number of channels: 1 is greyscale, 3 is RGB."""
        return len(self.mean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder, a plain pre-norm ViT without class token."""

    size: str = setting("B", "Ti, S, B, L, H, g, or WIDTHxDEPTHxHEADS[xMLP_RATIO], such as 64x3x4.")
    patch_size: int = setting(16, "Pixels a side of a patch.")
    init: Literal["normal", "fan_in"] = setting(
        "normal", "Standard deviation of the kernels: 0.02, or 0.02 * sqrt(768 / fan_in), better at small widths."
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "Type of the matrix products; parameters and losses stay float32."
    )
    layers: Literal["unrolled", "scanned"] = setting(
        "unrolled", "Every layer compiled, or one layer in a loop, which compiles quicker and runs slower."
    )
    remat: Literal["none", "dots", "full"] = setting(
        "none", "What the backward pass computes anew to save memory: nothing, all but Dense outputs, or everything."
    )

    def __post_init__(self):
        at_least("model", 1, patch_size=self.patch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW; the learning rate warms up linearly and decays on a cosine, weight decay moves on one."""

    epochs: float = setting(100.0, "Length of the run, in passes over the training images.")
    warmup_epochs: float = setting(15.0, "Of these, with a rising learning rate.")
    learning_rate_start: float = setting(1e-4, "At the first step.")
    learning_rate: float = setting(1e-3, "At the end of the warm-up.")
    learning_rate_end: float = setting(1e-6, "At the last step.")
    weight_decay_start: float = setting(0.04, "Decay at the first step; it is multiplied by the learning rate.")
    weight_decay_end: float = setting(0.4, "Decay at the last step.")
    beta1: float = setting(0.9, "AdamW's momentum.")
    beta2: float = setting(0.999, "AdamW's momentum of the squares.")
    eps: float = setting(1e-8, "AdamW's epsilon.")
    schedule_offset: int = setting(
        1,
        "Step k, from 0, takes learning rate and weight decay of k + this; 1 is what I-JEPA's released code does.",
        before=0,
    )

    def __post_init__(self):
        fields = dataclasses.asdict(self)
        at_least("optim", 0, **fields)
        require(self.epochs > 0, f"optim.epochs must be positive, got {self.epochs}")
        require(
            self.warmup_epochs < self.epochs,
            f"optim.warmup_epochs must be below optim.epochs = {self.epochs}, got {self.warmup_epochs}",
        )
        require(self.schedule_offset <= 1, f"optim.schedule_offset must be 0 or 1, got {self.schedule_offset}")
        for key in ("beta1", "beta2"):
            require(fields[key] < 1, f"optim.{key} must be below 1, got {fields[key]}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Momentum of the moving average, linear from start to end; 0 and 0 switch the average off."""

    start: float = setting(0.996, "Momentum at the first step.")
    end: float = setting(1.0, "Momentum at the last step.")

    def __post_init__(self):
        for key, value in dataclasses.asdict(self).items():
            require(0 <= value <= 1, f"ema.{key} must be in [0, 1], got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the devices share the parameters; the batch is split over all of them in any case."""

    fsdp: int = setting(1, "Devices that hold one copy of the parameters between them; further copies are replicas.")
    parameters: Literal["replicated", "zero1", "fsdp"] = setting(
        "replicated", "Whether parameters are whole everywhere, gathered once a step, or gathered a layer at a time."
    )

    def __post_init__(self):
        at_least("mesh", 1, fsdp=self.fsdp)
        require(
            (self.parameters == "replicated") == (self.fsdp == 1),
            f"mesh.fsdp = {self.fsdp} does not go with mesh.parameters = {self.parameters!r}: replicated is 1, the "
            "others more",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """How often progress goes to the bar, metrics.jsonl and TensorBoard."""

    every: int = setting(50, "Steps between log lines.")

    def __post_init__(self):
        at_least("log", 1, every=self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When checkpoints are written, and which stay."""

    every: int = setting(1000, "Steps between checkpoints; the last step is always saved.")
    keep_last: int = setting(2, "How many of the newest stay.")
    keep_every: int = setting(0, "Checkpoints at multiples of this step stay for good; 0: none.")

    def __post_init__(self):
        at_least("checkpoint", 1, every=self.every, keep_last=self.keep_last)
        at_least("checkpoint", 0, keep_every=self.keep_every)
        require(
            self.keep_every % self.every == 0,
            f"checkpoint.keep_every must be a multiple of checkpoint.every = {self.every}, got {self.keep_every}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation during training and at its end."""

    every: int = setting(0, "Steps between evaluations; 0: none, and no table at the end.")
    evaluators: tuple[str, ...] = setting(("knn", "logistic"), "What is evaluated; see docs/evaluation.md.")
    images: int = setting(10_000, "Images of each split, at most: a random sample, always the same; 0: all.")
    crop_fraction: float = setting(0.875, "Side of the central crop over the short side of the image.")
    neighbours: int = setting(20, "k of the nearest neighbours.")
    shots: int = setting(10, "Labels of a class, where few labels are used.")
    draws: int = setting(5, "Draws of the few labels.")

    def __post_init__(self):
        at_least("eval", 0, every=self.every, images=self.images)
        require(0 < self.crop_fraction <= 1, f"eval.crop_fraction must be in (0, 1], got {self.crop_fraction}")
        at_least("eval", 1, neighbours=self.neighbours, shots=self.shots, draws=self.draws)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole experiment, as far as all methods have it in common; a method's own settings extend it."""

    method: str = setting("cjepa", "What is trained; see docs/architecture.md.")
    seed: int = setting(0, "Root of all random draws.")
    data: Data = group(Data, "Where images come from and how they are cropped.")
    model: Model = group(Model, "The encoder, a plain pre-norm ViT without class token.")
    optim: Optim = group(Optim, "AdamW and its schedules.")
    ema: Ema = group(Ema, "Momentum of the moving average, linear from start to end; 0 and 0 switch it off.")
    mesh: Mesh = group(Mesh, "How the devices share the parameters.")
    log: Log = group(Log, "Progress bar, metrics.jsonl and TensorBoard.")
    checkpoint: Checkpoint = group(Checkpoint, "When checkpoints are written, and which stay.")
    eval: Eval = group(Eval, "Evaluation during training and at its end.")

    def __post_init__(self):
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
        require(
            self.mesh.parameters != "fsdp" or self.model.remat != "none",
            "mesh.parameters = 'fsdp' wants model.remat = 'dots' or 'full': else the backward pass would keep every "
            "layer's gathered parameters",
        )

    @property
    def grid(self) -> int:
        """Gives the number of patches along a side of an image."""
        return self.data.image_size // self.model.patch_size
