"""A checkpoint of one kind -> one of another, whole or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from cjepa_jax import pretrained
from cjepa_jax.config import require
from cjepa_jax.interop import card, formats, tensors, timm

# All that a folder of ours holds; --force deletes no other.
_OURS = {"config.json", "checkpoints", "model.safetensors", "preprocessor_config.json", "README.md"}


def convert(source: str, output: str, kind: str, *, tower: str | None, force: bool, given: tensors.Given) -> str:
    """What the command does; returns what to tell the user.

    Raises UserError.
    """
    path = epath.Path(source).expanduser()
    opened = formats.open_source(path, given)
    target = pathlib.Path(output).expanduser()
    _check_output(path, target, kind, force)
    towers = _choose(opened.towers, kind, tower)
    networks = opened.load(towers)
    if kind in ("timm", "transformers"):  # which know one encoder and one head
        networks = networks._replace(params={name.removeprefix("ema_"): x for name, x in networks.params.items()})
    shapes = pretrained.shapes(networks, classes=tensors.class_count(networks))
    for name in networks.params.keys() & shapes.keys():
        pretrained.check(networks.params[name], shapes[name], f"--input {source}: its {name}")
    if opened.kind == "orbax":
        run = card.read_run(pretrained.describe(path)[0], step=networks.step, tower=towers[0])
    else:
        run = card.Run(path.name, towers[0])
    load_with = [timm.call(networks, str(target))] if kind == "timm" else []
    with _atomically(target) as new:
        formats.WRITERS[kind](new, networks, run)
    left_out = [name for name in opened.towers if name not in towers]
    lines = [
        f"{opened.kind} -> {kind}: {target}, {networks.model.size}/{networks.model.patch_size}, {', '.join(towers)}"
    ]
    lines += [f"left out: {', '.join(left_out)}"] if left_out else []
    return "\n".join(lines + load_with)


def _choose(towers: Sequence[str], kind: str, tower: str | None) -> list[str]:
    """Of the towers of the input, those that go into the output."""
    if kind in ("orbax", "ijepa"):
        require(tower is None, f"--tower goes with timm and transformers; --format={kind} has room for all")
        wanted = [name for name in towers if kind == "orbax" or name in ("encoder", "predictor", "target_encoder")]
        require(bool({"encoder", "target_encoder"} & set(wanted)), "--input has no encoder")
        return wanted
    if tower is None:
        tower = "target_encoder" if "target_encoder" in towers else "encoder"
    require(tower in towers, f"--input has no {tower}, only {', '.join(towers)}")
    head = "ema_head" if tower == "ema_encoder" else "head"
    return [tower] + ([head] if head in towers else [])


def _check_output(source: Any, output: pathlib.Path, kind: str, force: bool) -> None:
    require(output.resolve().parent.is_dir(), f"--output {output}: {output.parent} does not exist; make it first")
    require(
        kind != "timm" or output.suffix == ".safetensors",
        f"--output {output} must end in .safetensors: timm knows its files by that",
    )
    if not output.exists():
        return
    require(force, f"--output {output} exists and is not replaced without --force")
    real = pathlib.Path(os.path.realpath(source))
    require(output.resolve() not in (real, *real.parents), f"--output {output} is --input, or holds it")
    folder = kind in ("orbax", "transformers")
    require(output.is_dir() == folder, f"--output {output} exists and is no {'folder' if folder else 'file'}")
    if folder:
        others = sorted(file.name for file in output.iterdir() if file.name not in _OURS)
        require(
            not others, f"--output {output} holds what is not of this command, and is not deleted: {', '.join(others)}"
        )


@contextlib.contextmanager
def _atomically(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write; what was written takes the place of `output` at the end, or nothing happens."""
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        yield new
        if output.is_dir():  # a folder cannot be replaced at one stroke
            output.rename(old)
        new.replace(output)
    finally:
        for path in (new, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
