"""Supervised training of an encoder and a linear classifier on the mean of its patches: fine-tuning.

Shapes: B images, N patches, D encoder width, L classes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from cjepa_jax.batch import Batch
from cjepa_jax.config import Config, Data, Eval, Model, Optim
from cjepa_jax.data.augment import Augmentation
from cjepa_jax.data.randaugment import RandAugment
from cjepa_jax.errors import require
from cjepa_jax.methods.base import Metrics, Outputs, Panels, Params, Transformer
from cjepa_jax.methods.encoder import EncoderMethod, apply
from cjepa_jax.methods.mixing import erase, mix
from cjepa_jax.models.vit import drop_path, normalise, parse_size, patchify
from cjepa_jax.settings import group, required, setting

_HEAD_STD = 2e-5  # MAE's


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedData(Data):
    """Where images come from and how they are cropped."""

    image_size: int = setting(
        224, "Pixels per side after cropping, or of height; 0: as the checkpoint has it.", within="[0, 8192]"
    )
    image_width: int = setting(
        0,
        "Pixels of width, where image_size is only the height; 0: the images are square, or, where image_size is 0, as "
        "the checkpoint has them.",
        within="[0, 8192]",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedModel(Model):
    """Which encoder of the checkpoint is fine-tuned, and how it is computed."""

    size: str = setting("", "Architecture; empty: that of the checkpoint.")
    patch_size: int = setting(0, "Pixels per side of a patch; 0: as the checkpoint has it.", within="[0, 1024]")
    encoder: Literal["target_encoder", "encoder", "random"] = setting(
        "target_encoder", "The encoder to start from; random is its architecture from scratch.", formerly="tower"
    )
    drop_path: float = setting(
        0.0,
        "Probability that an image skips a branch of the last block; it rises linearly from 0 in the first block.",
        within="[0, 1)",
    )

    patch_follows_image: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to crops and labels, after the flip."""

    randaugment: int = setting(0, "Operations drawn for each image; 0: none.", within="[0, 16]")
    probability: float = setting(0.5, "Probability that a drawn operation is done.", within="[0, 1]")
    magnitude: float = setting(9.0, "Strength of RandAugment's operations; 10 is the strongest.", within="[0, 10]")
    magnitude_std: float = setting(0.5, "Standard deviation of normal noise on the magnitude.", within="[0, 10]")
    erase: float = setting(0.0, "Probability that a random rectangle becomes noise.", within="[0, 1]")
    mixup: float = setting(
        0.0, "Alpha of the beta distribution of the shares of two images; 0: off.", within="[0, 100]"
    )
    cutmix: float = setting(
        0.0, "Alpha of cutmix; 0: off. With mixup on, each image gets one of both at random.", within="[0, 100]"
    )
    label_smoothing: float = setting(0.0, "Share of a label that all classes divide between them.", within="[0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedOptim(Optim):
    """AdamW with smaller steps for layers nearer to the pixels."""

    layer_decay: float = setting(
        1.0, "Factor on the learning rate from one layer to the one before; 1: none.", within="(0, 1]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedEval(Eval):
    """Accuracy on the test split, during training and at its end."""

    every: int = required("Steps between evaluations.", within="[1, 1e9]")
    evaluators: tuple[str, ...] = setting(("accuracy",), "What is evaluated; see docs/evaluation.md.")
    images: int = setting(
        0, "Images of each split, at most: a random sample, always the same; 0: all.", within="[0, 1e9]"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(Config):
    """Settings of fine-tuning, or of supervised training from scratch."""

    method: str = setting("supervised", "What is trained; see docs/methods.md.")
    data: TunedData = group(TunedData, "Where images come from and how they are cropped.")
    model: TunedModel = group(TunedModel, "Which encoder of the checkpoint is fine-tuned, and how it is computed.")
    augment: Augment = group(Augment, "What is done to crops and labels, after the flip.")
    optim: TunedOptim = group(TunedOptim, "AdamW, its schedules, and smaller steps for lower layers.")
    eval: TunedEval = group(TunedEval, "Accuracy on the test split, during training and at its end.")


class MixedImages(NamedTuple):
    """Augmented images of a batch, and what is wanted for them."""

    images: Float[Array, "B H W C"]
    targets: Float[Array, "B L"]
    keep: Float[Array, "B depth 2"] | None  # of stochastic depth


@dataclasses.dataclass(frozen=True)
class Supervised(EncoderMethod):
    """Trains encoder and head on labels; the average of both is evaluated beside them."""

    config: SupervisedConfig

    settings = SupervisedConfig
    averaged: ClassVar[Mapping[str, str]] = {"ema_encoder": "encoder", "ema_head": "head"}
    needs_labels = True
    indivisible = "{side} is not divisible by the checkpoint's patch size, {patch}"
    panels: ClassVar[Panels] = {
        "Loss, of mixed images": ("loss/total",),
        "Top 1 on held-out images": ("eval/top1", "eval/ema_top1"),
        "Top 5 on held-out images": ("eval/top5", "eval/ema_top5"),
    }

    @property
    def views(self) -> tuple[Augmentation, ...]:
        """Gives one view, with RandAugment where it is asked for."""
        data, augment = self.config.data, self.config.augment
        mean = tuple(round(255 * x) for x in data.mean)
        distort = RandAugment(
            operations=augment.randaugment,
            probability=augment.probability,
            magnitude=augment.magnitude,
            magnitude_std=augment.magnitude_std,
            fill=mean if data.channels > 1 else mean[0],
        )
        (view,) = super().views
        return (dataclasses.replace(view, distort=distort if augment.randaugment else None),)

    def init(self, rng: jax.Array) -> Params:
        """Draws the encoder, and a head {"kernel" [D, L], "bias" [L]}."""
        rng_encoder, rng_head = jax.random.split(rng)
        head = {
            "kernel": _HEAD_STD * jax.random.normal(rng_head, (self.encoder.size.width, self.classes)),
            "bias": jnp.zeros(self.classes),
        }
        return {"encoder": self.init_encoder(rng_encoder), "head": head}

    def prepare(self, batch: Batch, rng: jax.Array) -> MixedImages:
        """Erases, mixes and smooths; draws which images skip which branches."""
        augment, data = self.config.augment, self.config.data
        rng_erase, rng_mix, rng_drop = jax.random.split(rng, 3)
        images = normalise(batch.images, mean=data.mean, std=data.std)
        images = erase(rng_erase, images, probability=augment.erase)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, self.classes), augment.label_smoothing)
        images, targets = mix(rng_mix, images, targets, mixup=augment.mixup, cutmix=augment.cutmix)
        depth, rate = self.encoder.size.depth, self.config.model.drop_path
        keep = drop_path(rng_drop, rate=rate, depth=depth, batch=len(images)) if rate else None
        return MixedImages(images, targets, None if keep is None else jnp.moveaxis(keep, 2, 0))

    def forward(self, params: Params, averages: Params, inputs: MixedImages) -> Outputs:
        """Computes the logits [B, L] of each image."""
        patches = patchify(inputs.images, self.config.model.patch_size)
        keep = None if inputs.keep is None else jnp.moveaxis(inputs.keep, 0, 2)
        features = apply(self.encoder, params["encoder"], patches, keep=keep)
        logits = features.mean(axis=1) @ params["head"]["kernel"] + params["head"]["bias"][None]
        return {"logits": logits, "targets": inputs.targets}

    def loss(self, params: Params, outputs: Outputs) -> tuple[Float[Array, ""], Metrics]:
        """Averages the cross entropy over the batch."""
        loss = optax.softmax_cross_entropy(outputs["logits"], outputs["targets"]).mean()
        return loss, {"loss/total": loss}

    def update_scale(self, params: Params) -> PyTree[float]:
        """Gives layer_decay^(depth + 1 - layer), as MAE has it.

        The embedding is layer 0, block i is layer i + 1, final norm and head are layer depth + 1.
        """
        decay, depth = self.config.optim.layer_decay, self.encoder.size.depth

        def factor(path: Any, _: Any) -> float:
            name = path[1].key  # of {"encoder": {name: ...}} or {"head": {name: ...}}
            layer = 0 if name == "embed" else int(name[5:]) + 1 if name.startswith("block") else depth + 1
            return decay ** (depth + 1 - layer)

        return jax.tree.map_with_path(factor, params)

    def networks(self, params: Params, averages: Params) -> dict[str, Any]:
        """Leaves the averages out where they are switched off."""
        return dict(params) if self.config.ema.off else {**averages, **params}

    @classmethod
    def networks_of_init(cls, config: Any) -> tuple[str, ...]:
        """Names the encoder that `model.encoder` asks for."""
        return () if config.model.encoder == "random" else (config.model.encoder,)

    @classmethod
    def resolve(cls, config: Any, path: str, networks: Any) -> Any:
        """Takes the architecture from the checkpoint. Raises UserError where settings contradict it."""
        model = config.model
        if networks is None:
            require(
                model.encoder == "random" and bool(model.size) and model.patch_size > 0,
                "--init is missing, e.g. --init=runs/vitb16; without it, model.encoder=random, model.size and "
                "model.patch_size say what is trained from scratch",
            )
            require(config.data.image_size > 0, "data.image_size = 0 follows the checkpoint --init, which is missing")
            return config
        for key in ("size", "patch_size"):
            given, wanted = getattr(model, key), getattr(networks.model, key)
            require(not given or given == wanted, f"model.{key} = {given}, but --init {path} has {wanted}")
        for key in ("mean", "std"):
            given, wanted = getattr(config.data, key), getattr(networks, key)
            require(given == wanted, f"data.{key} = {given}, but --init {path} was trained with {wanted}")
        taken = {key: getattr(networks.model, key) for key in ("size", "patch_size", "init")}
        data = config.data
        if data.image_size == 0:
            height, width = networks.image_size, data.image_width or networks.image_width
            data = dataclasses.replace(data, image_size=height, image_width=width)
        return dataclasses.replace(config, data=data, model=dataclasses.replace(model, **taken))

    def start_from(self, networks: Params) -> tuple[Params, Params]:
        """Starts the encoder and its average; the head stays fresh."""
        (encoder,) = networks.values()
        return super().start_from({"encoder": encoder})

    def transformers(self) -> dict[str, Transformer]:
        """Lists the encoder, the only stack of blocks."""
        size, tokens = parse_size(self.config.model.size), math.prod(self.config.grid)
        other = 2 * self.patch_values * size.width * tokens + 2 * size.width * self.classes
        return {"encoder": Transformer(1, tokens, *size, False, self.trains("encoder"), other)}
