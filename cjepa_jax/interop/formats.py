"""Lists the formats by name, writes each of them, and recognises which one a path is."""

from collections.abc import Callable, Sequence

from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.errors import UserError, require
from cjepa_jax.files import check_bucket_support, is_file
from cjepa_jax.interop import ijepa, timm, transformers
from cjepa_jax.interop.tensors import ImportOptions, OpenedCheckpoint, merge_options
from cjepa_jax.models.vit import parse_size
from cjepa_jax.pretrained import Pretrained

WRITERS: dict[str, Callable[..., None]] = {  # (path, networks, run) -> None; the path must not exist yet
    "orbax": lambda path, networks, run: pretrained.save(
        epath.Path(path), networks, crop_fraction=run.config.get("eval.crop_fraction")
    ),
    "ijepa": lambda path, networks, run: ijepa.write(path, networks),
    "timm": lambda path, networks, run: timm.write(path, networks),
    "transformers": transformers.write,
}


def _open_ours(path: epath.Path, options: ImportOptions) -> OpenedCheckpoint:
    """Opens a checkpoint of this package; flags may give other means and standard deviations than it says."""

    def load(names: Sequence[str]) -> Pretrained:
        found = pretrained.load(path, names)
        said = {"num_heads": parse_size(found.model.size).heads, "mean": found.mean, "std": found.std}
        merged = merge_options(path, options, said)
        mean, std = merged.mean or found.mean, merged.std or found.std
        channels = len(found.mean)
        require(len(mean) == len(std) == channels, f"--mean and --std need {channels} numbers each, one for a channel")
        return found._replace(mean=mean, std=std)

    return OpenedCheckpoint("orbax", pretrained.available(path), load)


def open_source(path: epath.Path, options: ImportOptions) -> OpenedCheckpoint:
    """Opens a checkpoint of any format.

    Raises UserError for a path of no known format, and for a file that cannot be read.
    """
    check_bucket_support(path, "--input")
    require(path.exists(), f"--input {path} does not exist")
    if path.is_dir():
        if (path / "state").is_dir() or (path / "checkpoints").is_dir():
            return _open_ours(path, options)
        if transformers.is_folder(path):
            return transformers.open_folder(path, options)
        raise UserError(
            f"--input {path} is not a checkpoint: neither a workdir, nor WORKDIR/checkpoints/STEP, nor a folder of "
            "transformers with config.json and *.safetensors"
        )
    require(is_file(path), f"--input {path} is neither a file nor a folder")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith((b"PK\3\4", b"\x80")):
        return ijepa.open_file(path, options)
    if start[8:] == b"{":
        return timm.open_file(path, options)
    raise UserError(f"--input {path} is neither a .pth.tar of PyTorch nor a safetensors file")
