"""Checkpoints of I-JEPA's release, .pth.tar: a pickle of state dicts and of the epoch."""

import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

from etils import epath

from cjepa_jax.config import UserError, one_line, require
from cjepa_jax.interop import torch_names
from cjepa_jax.interop.tensors import Given, Source, assemble, check_float32, give
from cjepa_jax.pretrained import ENCODERS, Pretrained

INSTALL_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def open_file(path: epath.Path, given: Given) -> Source:
    """Raises UserError for a file with code in it, a damaged one, and one of another kind."""
    content = _load_pickle(path)
    networks = {
        tower: {name.removeprefix("module."): x for name, x in content[tower].items()}
        for tower in ("encoder", "predictor", "target_encoder")
        if isinstance(content, dict) and isinstance(content.get(tower), dict)
    }
    require(
        any(tower in networks for tower in ENCODERS),
        f"--input {path} is no checkpoint of I-JEPA: it has neither encoder nor target_encoder, but "
        f"{', '.join(map(str, content)) if isinstance(content, dict) else type(content).__name__}",
    )
    kinds = {
        f"{tower}: {name}": str(getattr(x, "dtype", type(x).__name__)).removeprefix("torch.")
        for tower, tensors in networks.items()
        for name, x in tensors.items()
    }
    check_float32(path, kinds, "float32")

    def load(towers: Sequence[str]) -> Pretrained:
        tensors = {tower: {name: x.numpy() for name, x in networks[tower].items()} for tower in towers}
        loaded = assemble(f"--input {path}", tensors, {tower: _names(tower) for tower in towers}, given)
        return loaded._replace(epoch=int(content.get("epoch", 0)))

    return Source("ijepa", tuple(networks), load)


def _load_pickle(path: epath.Path) -> Any:
    """Only tensors and plain values are accepted; nothing in the file is run."""
    torch = _torch()
    options = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **options)  # what is not asked for is never read
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, **options)  # the format of PyTorch before 1.6
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        raise UserError(
            f"--input {path} is refused: it holds more than tensors and plain values, and a pickle may run code "
            f"({one_line(reason or error)[:200]})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"--input {path} cannot be read by PyTorch: {one_line(error)[:300]}") from None


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f".pth.tar files, and nothing else here, need PyTorch: {INSTALL_TORCH}") from None
    return torch


def _names(tower: str) -> torch_names.Names:
    return torch_names.PREDICTOR if tower == "predictor" else torch_names.ENCODER


def write(path: pathlib.Path, networks: Pretrained) -> None:
    """encoder, predictor, target_encoder and epoch; an encoder that is alone is both."""
    torch = _torch()
    content: dict[str, Any] = {}
    for tower, params in networks.params.items():
        tensors = give(params, _names(tower), networks)
        content[tower] = {name: torch.from_numpy(x) for name, x in tensors.items()}
    alone = next(tower for tower in ENCODERS if tower in content)
    content = {tower: content[alone] for tower in ENCODERS} | content
    torch.save(content | {"epoch": networks.epoch}, path)
