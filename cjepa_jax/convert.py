"""Convert checkpoints to PyTorch and back.

    python -m cjepa_jax.convert --input=PATH --output=PATH --format=orbax|ijepa|timm|transformers

--input=PATH              names a checkpoint of any of these formats; the command recognises which
--output=PATH             names a new folder (orbax, transformers) or file (ijepa, timm)
--format=orbax            writes what cjepa_jax evaluates, fine-tunes, and starts new runs from by --init
--format=ijepa            writes a .pth.tar as I-JEPA's release reads it; needs PyTorch, the others do not
--format=timm             writes a .safetensors file for timm.create_model(..., checkpoint_path=PATH)
--format=transformers     writes a folder for IJepaModel.from_pretrained
--encoder=target_encoder  chooses the encoder that goes into timm and transformers; encoder is the context encoder;
                          a fine-tuned network has encoder, which is the default there, and ema_encoder, its average
--force                   replaces an output that exists

These flags say what an input may leave open, or say wrongly:

--num-heads=N             attention heads; by default the size table's for the width (Ti 3, S 6, B 12, L, H and g 16)
--mean=X,X,X --std=X,X,X  of the images' values in [0, 1]; by default what the input says, or ImageNet's

Nothing is written unless all names and shapes are right.

Exit codes: 0 finished; 2 a mistake that the user can mend; 1 any other error; 130 and 143 ended by
Ctrl-C and SIGTERM.
"""

import os

from absl import flags

from cjepa_jax import command, signals
from cjepa_jax.errors import UserError, require

FORMATS = ("orbax", "ijepa", "timm", "transformers")
_INPUT = flags.DEFINE_string("input", None, "The checkpoint to convert.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the converted checkpoint goes.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "The format of the output.")
_ENCODER = flags.DEFINE_enum(
    "encoder",
    None,
    ("target_encoder", "encoder", "ema_encoder"),
    "The encoder that goes into a format with room for one.",
)
flags.DEFINE_alias("tower", "encoder")  # its former name
_FORCE = flags.DEFINE_bool("force", False, "Replace an output that exists.")
_HEADS = flags.DEFINE_integer("num-heads", None, "Attention heads of the input.", lower_bound=1)
_MEAN = flags.DEFINE_list("mean", None, "Mean of the images, per channel.")
_STD = flags.DEFINE_list("std", None, "Standard deviation of the images, per channel.")
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
    # Nothing is computed, so an accelerator would only be taken from others. This must precede the import of jax.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from cjepa_jax.interop.conversion import convert
    from cjepa_jax.interop.tensors import ImportOptions

    options = ImportOptions(_HEADS.value, _parse_numbers("mean", _MEAN.value), _parse_numbers("std", _STD.value))
    with signals.cleaned_up():
        print(convert(source, output, kind, encoder=_ENCODER.value, force=_FORCE.value, options=options))


def main() -> None:
    """Runs the command; exits with 0, with 2 after a mistake that the user can mend, with 1 after any other error."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
