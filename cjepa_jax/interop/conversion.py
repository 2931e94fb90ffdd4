"""Converts a checkpoint of one format to another, completely or not at all."""

import contextlib
import glob
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.errors import UserError, require, saying
from cjepa_jax.files import check_bucket_support, check_writable, read_json, storing, write_whole
from cjepa_jax.interop import card, formats, tensors, timm, transformers

# Everything that a folder written here may hold; --force deletes no folder that holds anything else.
_CONVERTED = "converted.json"  # says of a folder PATH.orbax which file it was made from
_OURS = {_CONVERTED, "config.json", "checkpoints", "model.safetensors", "preprocessor_config.json", "README.md"}


def convert(
    source: str, output: str, kind: str, *, encoder: str | None, force: bool, options: tensors.ImportOptions
) -> str:
    """Converts the checkpoint at `source` to the format `kind` at `output`; returns what to tell the user.

    `encoder` chooses the one that goes into formats with room for one; None is the usual choice. Where `force` is
    set, an output that exists is replaced.

    Raises UserError for an input that cannot be read or has other names or shapes, and for an output that exists.
    """
    path = epath.Path(source).expanduser()
    opened = formats.open_source(path, options)
    target = pathlib.Path(output).expanduser()
    _check_output(path, target, kind, force)
    chosen = _choose(opened.networks, kind, encoder)
    networks = opened.load(chosen)
    if kind in ("timm", "transformers"):  # these formats know one encoder and one head
        networks = networks._replace(params={name.removeprefix("ema_"): x for name, x in networks.params.items()})
    shapes = pretrained.shapes(networks, classes=tensors.class_count(networks))
    for name in networks.params.keys() & shapes.keys():
        pretrained.check(networks.params[name], shapes[name], f"--input {source}: its {name}")
    if opened.kind == "orbax":
        run = card.read_run(pretrained.describe(path)[0], step=networks.step, encoder=chosen[0])
    else:
        run = card.TrainedRun(path.name, chosen[0])
    load_with = [timm.call(networks, str(target), crop_fraction=run.crop_fraction)] if kind == "timm" else []
    with _atomically(target) as new:
        formats.WRITERS[kind](new, networks, run)
    left_out = [name for name in opened.networks if name not in chosen]
    lines = [
        f"{opened.kind} -> {kind}: {target}, {networks.model.size}/{networks.model.patch_size}, {', '.join(chosen)}"
    ]
    lines += [f"left out: {', '.join(left_out)}"] if left_out else []
    return "\n".join(lines + load_with)


def in_our_format(path: epath.Path) -> epath.Path:
    """Returns the path of a checkpoint that evaluation can read: `path` itself, where that is one.

    A file, or a folder of transformers, is converted into the folder PATH.orbax beside it, once; a note on stderr says
    so. Raises UserError as `convert` does.
    """
    path = path.expanduser()
    check_bucket_support(path, "--checkpoint")
    if not path.exists() or (path.is_dir() and not transformers.is_folder(path)):
        return path
    ours = path.with_name(f"{path.name}.orbax")
    files = [path, *(sorted(path.iterdir()) if path.is_dir() else ())]
    source = [[file.name, file.stat().length, file.stat().mtime] for file in files]
    note = ours / _CONVERTED
    if ours.exists():
        if note.exists():
            same = read_json(note).get("from") == source
        else:  # made before there was this note
            same = max(mtime for *_, mtime in source) <= (ours / "config.json").stat().mtime
        require(
            same,
            f"{path} has changed since {ours} was made from it; remove {ours}, or name it by --checkpoint",
        )
        print(f"reads {ours}, which was converted from {path} before", file=sys.stderr, flush=True)
    else:
        try:
            with saying("--checkpoint", instead_of="--input"):
                said = convert(
                    str(path), str(ours), "orbax", encoder=None, force=False, options=tensors.ImportOptions()
                )
        except UserError as error:
            if str(error).startswith("--output"):
                reason = str(error).removeprefix("--output ").removesuffix("; name another place")
                raise UserError(
                    f"--checkpoint {path} is converted beside itself, and {reason}; convert it elsewhere by python -m "
                    f"cjepa_jax.convert --input={path} --output=DIR --format=orbax, and give --checkpoint=DIR"
                ) from None
            if "give --" not in str(error):
                raise
            command = f"python -m cjepa_jax.convert --input={path} --output={ours} --format=orbax"
            raise UserError(f"{error}; that is a flag of {command}") from None
        write_whole(note, json.dumps({"from": source}) + "\n")
        print(said, file=sys.stderr, flush=True)
    return ours


def _choose(networks: Sequence[str], kind: str, encoder: str | None) -> list[str]:
    """Returns the names of those networks of the input that go into the output, an encoder first."""
    if kind in ("orbax", "ijepa"):
        require(encoder is None, f"--encoder goes with timm and transformers; --format={kind} has room for all")
        wanted = [name for name in networks if kind == "orbax" or name in ("encoder", "predictor", "target_encoder")]
        require(bool({"encoder", "target_encoder"} & set(wanted)), "--input has no encoder")
        return wanted
    if encoder is None:
        encoder = "target_encoder" if "target_encoder" in networks else "encoder"
    require(encoder in networks, f"--input has no {encoder}, only {', '.join(networks)}")
    head = "ema_head" if encoder == "ema_encoder" else "head"
    return [encoder] + ([head] if head in networks else [])


def _check_output(source: epath.Path, output: pathlib.Path, kind: str, force: bool) -> None:
    """Raises UserError for an output that cannot be written, or that would replace what must stay."""
    require("\0" not in str(output), "--output holds a character that no path may hold")
    require(bool(output.name), f"--output {output} names no new folder or file")
    target = pathlib.Path(os.path.realpath(output))  # `resolve` raises where links run in a circle
    require(target.parent.is_dir(), f"--output {output}: {output.parent} does not exist; make it first")
    check_writable(epath.Path(output), "--output")
    require(
        kind != "timm" or output.suffix == ".safetensors",
        f"--output {output} must end in .safetensors: timm knows its files by that",
    )
    if not output.exists():
        return
    require(force, f"--output {output} exists and is not replaced without --force")
    real = pathlib.Path(os.path.realpath(source))
    require(target not in (real, *real.parents), f"--output {output} is --input, or holds it")
    folder = kind in ("orbax", "transformers")
    require(output.is_dir() == folder, f"--output {output} exists and is not a {'folder' if folder else 'file'}")
    if folder:
        others = sorted(file.name for file in output.iterdir() if file.name not in _OURS)
        require(
            not others, f"--output {output} holds what is not of this command, and is not deleted: {', '.join(others)}"
        )


@contextlib.contextmanager
def _atomically(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to; at the end what was written replaces `output`, or after an error nothing changes."""
    output = pathlib.Path(os.path.realpath(output))  # a link stays one
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    for remains in _remains(output, "new"):
        _remove(remains)
    try:
        with storing(epath.Path(output)):
            yield new
        if output.is_dir():  # a folder cannot be replaced at one stroke
            output.rename(old)
        new.replace(output)
        for remains in _remains(output, "old"):  # only now, because one may hold what there was
            _remove(remains)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        for path in (new, old):
            _remove(path)


def _remains(output: pathlib.Path, word: str) -> Iterator[pathlib.Path]:
    """Gives what earlier conversions to `output` have left that were killed."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.*.{word}"):
        process = path.name.split(".")[-2]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            yield path
        except (ValueError, OSError, OverflowError):
            pass  # not of this command, or of another user's process


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
