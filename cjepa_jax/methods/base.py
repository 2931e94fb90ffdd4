"""What a method of training is: a value that the step, the loop, evaluation, conversion and compiling take.

Adding one: its file beside this one, a line in the registry of methods/__init__.py, a config, a test file.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

from cjepa_jax.batch import Batch
from cjepa_jax.config import Config
from cjepa_jax.data.augment import Augmentation
from cjepa_jax.models.attention import Attend, attend_xla
from cjepa_jax.models.masking import Masks

Params = Mapping[str, PyTree[Array]]  # name of a network -> its parameters, float32
Inputs = Any  # a tree of arrays, whatever `prepare` makes; the first axis of each array is the image
Outputs = Mapping[str, Array]  # whatever `forward` makes; the first axis of each array is the image
Metrics = dict[str, Float[Array, ""]]
Panels = Mapping[str, tuple[str, ...]]  # title of a panel of curves.png -> the metrics that it shows


KEPT = "kept"  # the name that `keep` gives to arrays


def keep(x: Array) -> Array:
    """Marks what the backward pass of a microbatch must find in memory, where it would otherwise compute it anew.

    `Method.forward` calls it on results that are expensive and that the gradient needs, such as C-JEPA's targets.
    """
    return checkpoint_name(x, KEPT)


class Transformer(NamedTuple):
    """A stack of transformer blocks as a step runs it, for predictions of its cost."""

    sequences: int  # per image
    tokens: int  # of a sequence, padding included
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    masked: bool  # whether some tokens are padding
    trained: bool  # whether it has a backward pass
    other_flops: float = 0.0  # forward FLOPs per image of what surrounds the blocks, such as an embedding


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A method of training, described by settings; all of it is pure functions.

    A training step calls `prepare`, `forward` and `loss` in this order. `forward` is what each image costs; `loss`
    is small and sees the whole global batch, however many devices and microbatches share it. So a statistic over the
    batch, such as a batch norm or a covariance, belongs in `loss`.

    Raises UserError on creation, where settings do not fit one another.
    """

    config: Config
    classes: int = 0  # of the training images' labels; 0 where they have none
    gather: Callable[[PyTree], PyTree] | None = None  # makes a block's parameters whole, of which devices hold parts
    attend: Attend = attend_xla  # how blocks compute attention

    settings: ClassVar[type[Config]] = Config  # the class of `config`
    averaged: ClassVar[Mapping[str, str]] = {}  # name of a moving average -> the network that it follows
    panels: ClassVar[Panels] = {}  # what curves.png shows beside learning rate, gradient norm, EMA momentum and speed
    needs_labels: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> Params:
        """Draws the parameters that a new run starts from."""

    @abc.abstractmethod
    def prepare(self, batch: Batch, rng: jax.Array) -> Inputs:
        """Makes all random draws of a step for the whole batch, such as masks; needs no parameters."""

    @abc.abstractmethod
    def forward(self, params: Params, averages: Params, inputs: Inputs) -> Outputs:
        """Runs the networks on some images, or all; what is computed of an image does not depend on the others.

        Diagnostics of collapse look at the entry "features" [B, D], where there is one.
        """

    @abc.abstractmethod
    def loss(self, params: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        """Computes the loss of the whole global batch, float32, and further metrics."""

    @property
    def views(self) -> tuple[Augmentation, ...]:
        """Says how each view of an image is cropped and augmented; by default there is one, as `config.data` has it."""
        return (Augmentation.of(self.config.data),)

    def update_scale(self, params: Params) -> PyTree[float] | None:
        """Gives a factor on the update of each parameter, or None where all are 1."""
        return None

    def masks(self, rng: jax.Array, batch: int) -> Masks | None:
        """Draws what is hidden of `batch` images, to be shown in masks.png; None where nothing is hidden."""
        return None

    def networks(self, params: Params, averages: Params) -> dict[str, PyTree[Array]]:
        """Lists all networks by the names by which evaluation and conversion know them."""
        return {**averages, **params}

    @classmethod
    def networks_of_init(cls, config: Any) -> tuple[str, ...]:
        """Lists the networks that --init gives to a new run, as far as the checkpoint has them."""
        return ("encoder",)

    @classmethod
    def resolve(cls, config: Any, path: str, networks: Any) -> Any:
        """Completes settings by those of the checkpoint --init; `networks` is what `pretrained.load` gave, or None."""
        return config

    def start_from(self, networks: Params) -> tuple[Params, Params]:
        """Gives the parameters and averages that the networks of --init replace at the start of a run."""
        # A step gives both away, so they must not share memory.
        averages = {name: jax.tree.map(np.copy, networks[of]) for name, of in self.averaged.items() if of in networks}
        return dict(networks), averages

    def transformers(self) -> dict[str, Transformer]:
        """Lists the stacks of blocks that a step runs: by them its FLOPs are counted, and the kernels are chosen."""
        return {}
