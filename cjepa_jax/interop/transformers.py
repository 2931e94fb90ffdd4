"""Reads and writes folders of transformers: config.json, model.safetensors, preprocessor_config.json, README.md."""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from etils import epath

from cjepa_jax.errors import require
from cjepa_jax.files import is_file, read_json
from cjepa_jax.interop import card, safetensors_files, torch_names
from cjepa_jax.interop.tensors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImportOptions,
    OpenedCheckpoint,
    class_count,
    merge_options,
    to_contiguous_tensors,
)
from cjepa_jax.models.layer_norm import LAYER_NORM_EPS
from cjepa_jax.models.vit import parse_size
from cjepa_jax.pretrained import Pretrained


def is_folder(path: epath.Path) -> bool:
    """Tells whether a folder looks like one of transformers; a workdir may hold exported files, too."""
    is_ours = (path / "checkpoints").exists()
    return not is_ours and is_file(path / "config.json") and any(path.glob("*.safetensors"))


def open_folder(path: epath.Path, options: ImportOptions) -> OpenedCheckpoint:
    """Opens a folder. Raises UserError for a folder of another kind of model, and for damaged files."""
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    require(kind == "ijepa", f"--input {path}: config.json describes a model of the type {kind}, not ijepa")
    for key, default, wanted in (
        ("hidden_act", "gelu", "gelu"),
        ("qkv_bias", True, True),
        ("layer_norm_eps", 1e-12, LAYER_NORM_EPS),
    ):
        value = config.get(key, default)
        require(value == wanted, f"--input {path}: config.json has {key} = {value}; only {wanted} can be converted")
    preprocessor = path / "preprocessor_config.json"
    images = read_json(preprocessor) if preprocessor.exists() else {}
    known = {"num_heads": config.get("num_attention_heads", 12)}
    known |= {key: images[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in images}
    halves = all(known.get(key) == [0.5, 0.5, 0.5] for key in ("mean", "std"))
    if halves and options.mean is options.std is None:
        mean, std = (",".join(map(str, values)) for values in (IMAGENET_MEAN, IMAGENET_STD))
        print(
            f"warning: {preprocessor} says a mean and std of 0.5, which is what transformers fills in; I-JEPA's own "
            f"encoders have ImageNet's: python -m cjepa_jax.convert takes --mean={mean} --std={std}",
            file=sys.stderr,
            flush=True,
        )
    # One number is the side of a square, which the tensors say, too.
    known |= {"image_size": sides} if isinstance(sides := config.get("image_size"), list) else {}
    tensors, _ = safetensors_files.read(path, sorted(path.glob("*.safetensors")))
    tensors = {name.removeprefix("ijepa."): x for name, x in tensors.items()}
    labels = config.get("id2label", {})
    numbered = isinstance(labels, dict) and set(labels) == set(map(str, range(len(labels))))
    require(numbered, f"--input {path}: config.json has an id2label that does not number its names from 0")
    names = {"target_encoder": torch_names.TRANSFORMERS, "head": torch_names.TRANSFORMERS_HEAD}
    classes = [labels[key] for key in sorted(labels, key=int)]
    options = merge_options(path, options, known)
    return safetensors_files.open_tensors("transformers", path, tensors, names, options, classes)


def write(path: pathlib.Path, networks: Pretrained, run: card.TrainedRun) -> None:
    """Writes config.json, model.safetensors, preprocessor_config.json and a model card, README.md, to a new folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(_config(networks), indent=2) + "\n")
    preprocessor = _preprocessor(networks, run)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (path / "README.md").write_text(card.readme(networks, run), errors="backslashreplace")
    tensors: dict[str, np.ndarray] = {}
    for network, params in networks.params.items():
        names = torch_names.TRANSFORMERS_HEAD if network == "head" else torch_names.TRANSFORMERS
        prefix = "ijepa." if "head" in networks.params and network != "head" else ""
        tensors |= {prefix + name: x for name, x in to_contiguous_tensors(params, names, networks).items()}
    safetensors_files.write(path / "model.safetensors", tensors, {})


def _config(networks: Pretrained) -> dict[str, Any]:
    size = parse_size(networks.model.size)
    config = {
        "architectures": ["IJepaForImageClassification" if "head" in networks.params else "IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": round(size.width * size.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": networks.image_size if networks.is_square else networks.image_shape,
        "patch_size": networks.model.patch_size,
        "num_channels": len(networks.mean),
        "qkv_bias": True,
    }
    if "head" in networks.params:
        names = networks.classes or [f"LABEL_{i}" for i in range(class_count(networks))]
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return config


def _preprocessor(networks: Pretrained, run: card.TrainedRun) -> dict[str, Any]:
    """Returns settings that prepare an image as evaluation does: the short side is resized, then the centre is cropped.

    Where the networks' images are not square, that is so for images of their aspect ratio. The image processor is
    CLIP's, because ViTImageProcessor would not crop.
    """
    height, width = networks.image_shape
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": len(networks.mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / run.crop_fraction)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": networks.mean,
        "image_std": networks.std,
    }
