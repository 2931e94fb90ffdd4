"""What timm and transformers share: one encoder, perhaps with a head, in safetensors files."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from cjepa_jax.config import UserError, one_line, require
from cjepa_jax.interop.tensors import Given, Source, Tensors, assemble, check_float32
from cjepa_jax.interop.torch_names import Names
from cjepa_jax.pretrained import Pretrained


def read(path: epath.Path, files: Sequence[epath.Path]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of the files, and the metadata of the last one."""
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="np") as content:
                names = list(content.keys())
                check_float32(path, {name: content.get_slice(name).get_dtype() for name in names}, "F32")
                tensors |= {name: content.get_tensor(name) for name in names}
                metadata = content.metadata() or {}
        except safetensors.SafetensorError as error:
            raise UserError(f"{file} is damaged ({one_line(error)})") from None
    return tensors, metadata


def write(path: pathlib.Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Contiguous tensors; adds to the metadata what PyTorch's readers ask for."""
    path.touch()
    mode = path.stat().st_mode  # as other files get it; safetensors' own lets nobody else read
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"} | metadata)
    path.chmod(mode)


def open_tensors(
    kind: str,
    path: epath.Path,
    tensors: Tensors,
    names: Mapping[str, Names],
    given: Given,
    classes: Sequence[str],
) -> Source:
    """Of one encoder, perhaps with a head."""
    prefix = f"{names['head'].modules['']}."
    split: dict[str, dict[str, np.ndarray]] = {"target_encoder": {}, "head": {}}
    for name, x in tensors.items():
        split["head" if name.startswith(prefix) else "target_encoder"][name] = x
    found = {tower: some for tower, some in split.items() if some or tower == "target_encoder"}

    def load(towers: Sequence[str]) -> Pretrained:
        loaded = assemble(f"--input {path}", {tower: found[tower] for tower in towers}, names, given)
        return loaded._replace(classes=tuple(classes) if "head" in towers else ())

    return Source(kind, tuple(found), load)


def agree(path: epath.Path, given: Given, known: Mapping[str, Any]) -> Given:
    """What the flags say and what the file says, as one."""
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    for key, value in known.items():
        said = getattr(given, key)
        flag = key.replace("_", "-")
        require(said in (None, value), f"--{flag} = {said}, but --input {path} says {value}: leave the flag out")
    return given._replace(**known)
