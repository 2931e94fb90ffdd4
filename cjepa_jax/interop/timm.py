"""Reads and writes checkpoints for timm's vit_*_patch*_gap_* models: one safetensors file each."""

import json
import pathlib
from typing import Any

import numpy as np
from etils import epath

from cjepa_jax.errors import UserError, one_line
from cjepa_jax.interop import safetensors_files, torch_names
from cjepa_jax.interop.tensors import (
    ImportOptions,
    OpenedCheckpoint,
    class_count,
    merge_options,
    to_contiguous_tensors,
)
from cjepa_jax.models.vit import parse_size
from cjepa_jax.pretrained import Pretrained

_SAID = ("mean", "std", "classes")  # in the metadata, beside num_heads and image_size


def open_file(path: epath.Path, options: ImportOptions) -> OpenedCheckpoint:
    """Opens a safetensors file. Raises UserError for a damaged file, and for one of another kind."""
    tensors, metadata = safetensors_files.read(path, [path])
    if any(name.startswith(("embeddings.", "ijepa.")) for name in tensors):
        raise UserError(f"--input {path} is part of a folder of transformers: name the folder, {path.parent}")
    try:
        wanted = ("num_heads", *_SAID, "image_size")
        known: dict[str, Any] = {key: json.loads(metadata[key]) for key in wanted if key in metadata}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--input {path} is damaged: its metadata cannot be read ({one_line(error)})") from None
    classes = known.pop("classes", ())
    names = {"target_encoder": torch_names.ENCODER, "head": torch_names.TIMM_HEAD}
    options = merge_options(path, options, known)
    return safetensors_files.open_tensors("timm", path, tensors, names, options, classes)


def write(path: pathlib.Path, networks: Pretrained) -> None:
    """Writes the tensors, and as metadata what they do not say.

    That is heads, mean, standard deviation, classes, and, of images that are not square, height and width.
    """
    metadata: dict[str, Any] = {"num_heads": parse_size(networks.model.size).heads}
    metadata |= {key: getattr(networks, key) for key in _SAID}
    metadata |= {} if networks.is_square else {"image_size": networks.image_shape}
    tensors: dict[str, np.ndarray] = {}
    for network, params in networks.params.items():
        names = torch_names.TIMM_HEAD if network == "head" else torch_names.ENCODER
        tensors |= to_contiguous_tensors(params, names, networks)
    safetensors_files.write(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})


def call(networks: Pretrained, path: str, *, crop_fraction: float) -> str:
    """Returns the line of Python that loads the file at `path` into a timm model with the settings of ours.

    By its pretrained_cfg timm prepares images as evaluation does here.
    """
    size = parse_size(networks.model.size)
    sides = networks.image_size if networks.is_square else networks.image_shape
    settings: dict[str, Any] = {"img_size": sides, "patch_size": networks.model.patch_size}
    settings |= {"in_chans": len(networks.mean), "embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    # timm rounds the width of the MLP down.
    settings |= {} if size.mlp_ratio == 4 else {"mlp_ratio": round(size.width * size.mlp_ratio) / size.width}
    settings |= {"num_classes": class_count(networks), "checkpoint_path": path}
    images: dict[str, Any] = {"input_size": (len(networks.mean), *networks.image_shape), "interpolation": "bilinear"}
    images |= {"crop_pct": crop_fraction, "mean": tuple(networks.mean), "std": tuple(networks.std)}
    settings |= {"pretrained_cfg_overlay": images}
    return f"timm.create_model('vit_base_patch16_gap_224', {', '.join(f'{k}={v!r}' for k, v in settings.items())})"
