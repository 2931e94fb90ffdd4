"""What Python programs use: `cjepa_jax.train` and `cjepa_jax.load`. docs/python.md shows both."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from cjepa_jax import pretrained, settings
from cjepa_jax.command import load_config
from cjepa_jax.data import sources
from cjepa_jax.errors import nearest, require
from cjepa_jax.evaluate.features import patch_features
from cjepa_jax.interop.conversion import in_our_format
from cjepa_jax.methods import find_method
from cjepa_jax.train import loop
from cjepa_jax.train.step import TrainState

PathLike = str | os.PathLike[str]


def train(
    config: PathLike | ConfigDict | Mapping[str, Any],
    *,
    workdir: PathLike,
    init: PathLike | None = None,
    source: sources.Source | None = None,
    extend: bool = False,
    **overrides: Any,
) -> TrainState:
    """Trains as `python -m cjepa_jax.main` does: to the end, or on from where the workdir stands.

    config: the name of a config that comes with the package, such as "vitb16"; the path of a config file; or settings.
    overrides: settings by group, `optim=dict(epochs=10), seed=1`. init: a checkpoint whose networks a new run starts
    from. source: your own images to train on, see `cjepa_jax.data.sources`; without it data.source says where they are.
    extend: lets optim.epochs be larger than it was in the workdir; the schedules then follow the new length.
    Returns the last state. Raises UserError and the other errors of `cjepa_jax.train.loop.train`.
    """
    logging.set_verbosity("error")  # TFDS' and Orbax' chatter, as in the commands
    if isinstance(config, str | os.PathLike):
        values = load_config(os.fspath(config))
    else:
        values = dict(config.to_dict() if isinstance(config, ConfigDict) else config)
    if source is not None:
        overrides["data"] = {**overrides.get("data", {}), "source": "own"}
    values = settings.merged(values, overrides)
    parsed: Any = settings.parse(values, find_method(values).settings)
    return loop.train(parsed, epath.Path(workdir), epath.Path(init) if init else None, source=source, extend=extend)


def load(checkpoint: PathLike, encoder: str | None = None) -> "FrozenEncoder":
    """Loads an encoder onto JAX's default device.

    checkpoint: a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP, or a file or folder of PyTorch, which is
    converted into the folder PATH.orbax.
    encoder: "target_encoder" or "encoder", by default the first of them that the checkpoint has. Raises UserError.
    """
    logging.set_verbosity("error")  # Orbax' chatter, as in the commands
    path = in_our_format(epath.Path(checkpoint))
    has = [name for name in pretrained.ENCODERS if name in pretrained.available(path, flag="checkpoint")]
    require(bool(has), f"checkpoint {path} has no encoder")
    require(encoder is None or encoder in has, f"checkpoint {path} has no {encoder}; {nearest(str(encoder), has)}")
    name = encoder or has[0]
    return FrozenEncoder(pretrained.load(path, [name]), name)


class FrozenEncoder:
    """Maps images to features by the parameters of a checkpoint, which stay as they are."""

    def __init__(self, networks: pretrained.Pretrained, name: str):
        self.networks = networks  # what is known of the checkpoint: model, image_size, mean, std, step
        self.name = name
        self._params = jax.device_put(networks.params[name])
        self._run: dict[tuple[int, int], Callable[..., Float[Array, "B N D"]]] = {}  # by the shape of the images

    def __call__(self, images: UInt8[np.ndarray, "B H W C"]) -> Float[Array, "B D"]:
        """Maps images to the mean over the features of their patches, which is what evaluation takes."""
        return self.patches(images).mean(axis=1)

    def patches(self, images: UInt8[np.ndarray, "B H W C"]) -> Float[Array, "B N D"]:
        """Maps images to the features of their patches, in raster order, float32.

        Positions are interpolated where the images do not have the height and width of training. Raises UserError for
        images of another type or number of channels, or whose sides the patches do not divide.
        """
        known, shape, dtype = self.networks, np.shape(images), getattr(images, "dtype", None)
        require(
            dtype == np.uint8 and len(shape) == 4 and min(shape[1:3]) > 0 and shape[3] == len(known.mean),
            f"images must be uint8 of shape [B, H, W, {len(known.mean)}], got {dtype} {list(shape)}",
        )
        seen = (shape[1], shape[2])
        if seen not in self._run:
            self._run[seen] = jax.jit(
                patch_features(
                    known.model, image_shape=seen, trained_shape=known.image_shape, mean=known.mean, std=known.std
                )
            )
        return self._run[seen](self._params, images)
