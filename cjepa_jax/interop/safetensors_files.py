"""Reads and writes what timm and transformers share: one encoder, perhaps with a head, in safetensors files."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import is_file
from cjepa_jax.interop.tensors import ImportOptions, OpenedCheckpoint, Tensors, assemble, check_float32
from cjepa_jax.interop.torch_names import Names
from cjepa_jax.pretrained import Pretrained


def read(path: epath.Path, files: Sequence[epath.Path]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns all tensors of the files by name, and the metadata of the last file.

    Raises UserError for a damaged file, and for tensors other than float32.
    """
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for file in files:
        require(is_file(file), f"{file} is not a file")
        try:
            with safetensors.safe_open(file, framework="np") as content:
                names = list(content.keys())
                check_float32(path, {name: content.get_slice(name).get_dtype() for name in names}, "F32")
                tensors |= {name: content.get_tensor(name) for name in names}
                metadata = content.metadata() or {}
        except (safetensors.SafetensorError, ValueError, OverflowError, OSError) as error:
            raise UserError(f"{file} is damaged ({one_line(error)})") from None
    return tensors, metadata


def write(path: pathlib.Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes contiguous tensors, and adds to the metadata what PyTorch's readers ask for."""
    path.touch()
    mode = path.stat().st_mode  # what other new files get; safetensors itself would let nobody else read
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"} | metadata)
    path.chmod(mode)


def open_tensors(
    kind: str,
    path: epath.Path,
    tensors: Tensors,
    names: Mapping[str, Names],
    options: ImportOptions,
    classes: Sequence[str],
) -> OpenedCheckpoint:
    """Opens the tensors of one encoder, perhaps with a head; the encoder is called target_encoder.

    `names` says how the format names the parameters of "target_encoder" and of "head".
    """
    prefix = f"{names['head'].modules['']}."
    are_names = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    require(are_names, f"--input {path}: its names of classes must be a list of names")
    split: dict[str, dict[str, np.ndarray]] = {"target_encoder": {}, "head": {}}
    for name, x in tensors.items():
        split["head" if name.startswith(prefix) else "target_encoder"][name] = x
    found = {network: x for network, x in split.items() if x or network == "target_encoder"}

    def load(wanted: Sequence[str]) -> Pretrained:
        loaded = assemble(f"--input {path}", {network: found[network] for network in wanted}, names, options)
        return loaded._replace(classes=tuple(classes) if "head" in wanted else ())

    return OpenedCheckpoint(kind, tuple(found), load)
