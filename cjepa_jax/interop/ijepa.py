"""Reads and writes checkpoints as I-JEPA's release has them, .pth.tar: a pickle of state dicts and of the epoch."""

import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

from etils import epath

from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.interop import torch_names
from cjepa_jax.interop.tensors import (
    ImportOptions,
    OpenedCheckpoint,
    assemble,
    check_float32,
    merge_options,
    to_contiguous_tensors,
)
from cjepa_jax.models.vit import parse_size
from cjepa_jax.pretrained import ENCODERS, Pretrained

_SAID = ("num_heads", "mean", "std")  # what the tensors do not say; the release's files do not hold it

INSTALL_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def open_file(path: epath.Path, options: ImportOptions) -> OpenedCheckpoint:
    """Opens a .pth.tar file. Raises UserError for a file with code in it, a damaged one, and one of another kind."""
    content = _load_pickle(path)
    networks = {
        network: {str(name).removeprefix("module."): x for name, x in content[network].items()}
        for network in ("encoder", "predictor", "target_encoder")
        if isinstance(content, dict) and isinstance(content.get(network), dict)
    }
    require(
        any(network in networks for network in ENCODERS),
        f"--input {path} is not a checkpoint of I-JEPA: it has neither encoder nor target_encoder, but "
        f"{', '.join(map(str, content))[:300] if isinstance(content, dict) else type(content).__name__}",
    )
    kinds = {f"{network}: {name}": _kind(x) for network, tensors in networks.items() for name, x in tensors.items()}
    check_float32(path, kinds, "float32")
    epoch = content.get("epoch", 0)
    require(type(epoch) is int and epoch >= 0, f"--input {path} is damaged: its epoch is not a number")
    for network, tensors in networks.items():  # a tensor may repeat few numbers without end
        claimed, held = 4 * sum(x.numel() for x in tensors.values()), path.stat().length
        require(claimed <= held, f"--input {path} is damaged: its {network} claims {claimed} bytes of a file of {held}")
    options = merge_options(path, options, {key: content[key] for key in _SAID if key in content})

    def load(wanted: Sequence[str]) -> Pretrained:
        tensors = {network: {name: x.detach().numpy() for name, x in networks[network].items()} for network in wanted}
        loaded = assemble(f"--input {path}", tensors, {network: _names(network) for network in wanted}, options)
        return loaded._replace(epoch=epoch)

    return OpenedCheckpoint("ijepa", tuple(networks), load)


def _load_pickle(path: epath.Path) -> Any:
    """Reads a pickle of tensors and plain values only; no code in the file is run."""
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
    except Exception as error:  # a damaged file makes PyTorch raise almost anything
        raise UserError(f"--input {path} cannot be read by PyTorch: {one_line(error)[:300]}") from None


def _kind(x: Any) -> str:
    """Returns the type of a tensor's numbers, or what else it is that cannot be converted."""
    if not isinstance(x, _torch().Tensor):
        return type(x).__name__
    plain = str(x.layout) == "torch.strided" and x.device.type == "cpu" and not x.is_neg()
    return str(x.dtype).removeprefix("torch.") if plain else f"{x.layout} on {x.device}"


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f".pth.tar files, and nothing else here, need PyTorch: {INSTALL_TORCH}") from None
    return torch


def _names(network: str) -> torch_names.Names:
    return torch_names.PREDICTOR if network == "predictor" else torch_names.ENCODER


def write(path: pathlib.Path, networks: Pretrained) -> None:
    """Writes encoder, predictor, target_encoder and epoch, and beside these the heads, mean and standard deviation.

    An encoder that is alone is written as both encoders. The release's code does not look at what it does not know.

    Raises UserError for networks of images that are not square, which the release's networks cannot be.
    """
    height, width = networks.image_shape
    require(
        networks.is_square,
        f"--format=ijepa is for square images only, and those of --input are {height} pixels high and {width} wide: "
        "--format=orbax, timm and transformers can hold it",
    )
    torch = _torch()
    content: dict[str, Any] = {}
    for network, params in networks.params.items():
        tensors = to_contiguous_tensors(params, _names(network), networks)
        content[network] = {name: torch.from_numpy(x) for name, x in tensors.items()}
    alone = next(network for network in ENCODERS if network in content)
    content = {network: content[alone] for network in ENCODERS} | content
    said = {"num_heads": parse_size(networks.model.size).heads, "mean": networks.mean, "std": networks.std}
    torch.save(content | {"epoch": networks.epoch} | said, path)
