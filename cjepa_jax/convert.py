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

import os

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
    from cjepa_jax.interop.conversion import convert
    from cjepa_jax.interop.tensors import Given

    given = Given(_HEADS.value, _parse_numbers("mean", _MEAN.value), _parse_numbers("std", _STD.value))
    print(convert(source, output, kind, tower=_TOWER.value, force=_FORCE.value, given=given))


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
