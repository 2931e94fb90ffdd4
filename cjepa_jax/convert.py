"""Checkpoints to PyTorch and back.

    python -m cjepa_jax.convert --input=PATH --output=PATH --format=orbax|ijepa|timm|transformers

--input=PATH              of any of these kinds, which is recognised
--output=PATH             a new folder (orbax, transformers) or file (ijepa, timm)
--format=orbax            for cjepa_jax itself: evaluation, fine-tuning, and --init of pre-training
--format=ijepa            a .pth.tar as I-JEPA's release reads it; needs PyTorch, the others do not
--format=timm             a .safetensors for timm.create_model(..., checkpoint_path=PATH)
--format=transformers     a folder for IJepaModel.from_pretrained
--tower=target_encoder    which encoder goes into timm and transformers; or encoder, the context encoder; of a
                          fine-tuned network encoder, which is the default there, or ema_encoder, its average
--force                   replaces an output that exists

What an input may leave open:

--num-heads=N             by default the size table's, by the width (Ti 3, S 6, B 12, L, H and g 16)
--mean=X,X,X --std=X,X,X  of the images, in [0, 1]; by default ImageNet's

Nothing is written unless all names and shapes are right.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from cjepa_jax import command
from cjepa_jax.config import UserError, require

FORMATS = ("orbax", "ijepa", "timm", "transformers")
_INPUT = flags.DEFINE_string("input", None, "The checkpoint.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the converted one goes.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Of the output.")
_TOWER = flags.DEFINE_enum(
    "tower", None, ("target_encoder", "encoder", "ema_encoder"), "Which encoder, where there is one only."
)
_FORCE = flags.DEFINE_bool("force", False, "Replaces an output that exists.")
_HEADS = flags.DEFINE_integer("num-heads", None, "Of the input's attention.", lower_bound=1)
_MEAN = flags.DEFINE_list("mean", None, "Of the images.")
_STD = flags.DEFINE_list("std", None, "Of the images.")
flags.DEFINE_alias("num_heads", "num-heads")

# All that a folder of ours holds; --force deletes no other.
_OURS = {"config.json", "checkpoints", "model.safetensors", "preprocessor_config.json", "README.md"}


def convert(source: str, output: str, kind: str, *, tower: str | None, force: bool, given: Any) -> str:
    """What the command does; returns what to tell the user. `given` is an `interop.tensors.Given`.

    Raises UserError.
    """
    from etils import epath

    from cjepa_jax import pretrained
    from cjepa_jax.interop import card, formats, tensors, timm

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


def _parse_numbers(flag: str, values: list[str] | None) -> tuple[float, ...] | None:
    try:
        return values and tuple(map(float, values))  # type: ignore[return-value]
    except ValueError:
        raise UserError(f"--{flag} must be numbers, such as 0.5,0.5,0.5") from None


def _run() -> None:
    source, output, kind = _INPUT.value or "", _OUTPUT.value or "", _FORMAT.value or ""
    for flag, value in (("input", source), ("output", output), ("format", kind)):
        require(bool(value), f"--{flag} is missing; --help explains the command")
    # Nothing is computed, so an accelerator would only be taken from others. Before jax is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from cjepa_jax.interop.tensors import Given

    given = Given(_HEADS.value, _parse_numbers("mean", _MEAN.value), _parse_numbers("std", _STD.value))
    print(convert(source, output, kind, tower=_TOWER.value, force=_FORCE.value, given=given))


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
