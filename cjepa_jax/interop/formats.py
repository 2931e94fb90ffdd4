"""The formats by name: which one a path is, and how each is written."""

from collections.abc import Callable

from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.config import UserError, require
from cjepa_jax.interop import ijepa, timm, transformers
from cjepa_jax.interop.tensors import Given, Source

WRITERS: dict[str, Callable[..., None]] = {  # (path, networks, run); the path must not exist
    "orbax": lambda path, networks, run: pretrained.save(epath.Path(path), networks),
    "ijepa": lambda path, networks, run: ijepa.write(path, networks),
    "timm": lambda path, networks, run: timm.write(path, networks),
    "transformers": transformers.write,
}


def open_source(path: epath.Path, given: Given) -> Source:
    """Raises UserError for a path of no known kind, and for a file that cannot be read."""
    require(path.exists(), f"--input {path} does not exist")
    if path.is_dir():
        if (path / "state").is_dir() or (path / "checkpoints").is_dir():
            return Source("orbax", pretrained.available(path), lambda towers: pretrained.load(path, towers))
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            return transformers.open_folder(path, given)
        raise UserError(
            f"--input {path} is no checkpoint: neither a workdir, nor WORKDIR/checkpoints/STEP, nor a folder of "
            "transformers with config.json and *.safetensors"
        )
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith((b"PK\3\4", b"\x80")):
        return ijepa.open_file(path, given)
    if start[8:] == b"{":
        return timm.open_file(path, given)
    raise UserError(f"--input {path} is neither a .pth.tar of PyTorch nor a safetensors file")
