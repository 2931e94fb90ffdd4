"""The settings of `python -m cjepa_jax.finetune`, their meaning and their checks (see cjepa_jax/config.py).

The architecture is that of the checkpoint and is no setting.
"""

import dataclasses
from typing import Literal

from cjepa_jax import config
from cjepa_jax.config import Checkpoint, Data, Ema, Log, Mesh, at_least, check_remat, require


def _probability(group: str, **values: float) -> None:
    for key, value in values.items():
        require(0 <= value <= 1, f"{group}.{key} must be in [0, 1], got {value}")


@dataclasses.dataclass(frozen=True)
class Model:
    """What of the checkpoint is tuned, and how it is computed."""

    tower: Literal["target_encoder", "encoder", "random"]  # random: its architecture from scratch, to compare with
    drop_path: float  # probability that the last block's branches are skipped, an image; linear from 0 at the first
    dtype: Literal["bfloat16", "float32"]  # this and the others as in pre-training
    layers: Literal["unrolled", "scanned"]
    remat: Literal["none", "dots", "full"]

    def __post_init__(self):
        require(0 <= self.drop_path < 1, f"model.drop_path must be in [0, 1), got {self.drop_path}")


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is done to crops and labels, after `data.flip`."""

    randaugment: int  # operations drawn for each image; 0: none
    probability: float  # that a drawn operation is done
    magnitude: float  # of 10
    magnitude_std: float  # of the normal noise on it, an operation
    erase: float  # probability that a random rectangle becomes noise
    mixup: float  # alpha of the beta distribution of the shares of two images; 0: off
    cutmix: float  # the same for a rectangle of the other image; where both are on, each has half of the images
    label_smoothing: float  # share of a label that all classes divide between them

    def __post_init__(self):
        fields = dataclasses.asdict(self)
        at_least("augment", 0, **fields)
        require(self.magnitude <= 10, f"augment.magnitude must be at most 10, got {self.magnitude}")
        _probability("augment", **{key: fields[key] for key in ("probability", "erase", "label_smoothing")})


@dataclasses.dataclass(frozen=True)
class Optim(config.Optim):
    """AdamW as in pre-training, with smaller steps for layers nearer to the pixels."""

    layer_decay: float  # factor on the learning rate from one layer to the one before; 1: none

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.layer_decay <= 1, f"optim.layer_decay must be in (0, 1], got {self.layer_decay}")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Accuracy on `data.test_split`."""

    every: int  # steps between evaluations; there is one at the end in any case
    crop_fraction: float  # side of the central crop over the short side of the image

    def __post_init__(self):
        at_least("eval", 1, every=self.every)
        require(0 < self.crop_fraction <= 1, f"eval.crop_fraction must be in (0, 1], got {self.crop_fraction}")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """A whole fine-tuning."""

    seed: int
    data: Data
    model: Model
    augment: Augment
    optim: Optim
    ema: Ema  # of all parameters, judged beside them; 0 and 0: none
    mesh: Mesh
    log: Log
    checkpoint: Checkpoint
    eval: Eval

    def __post_init__(self):
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}")
        check_remat(self.mesh, self.model.remat)
