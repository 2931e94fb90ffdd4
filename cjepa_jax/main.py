"""Pre-train C-JEPA.

    python -m cjepa_jax.main --config=configs/vitb16.py

--config=FILE             the experiment; its docstring says what it needs
--workdir=DIR             where results go; default runs/<name of the config file>
--config.GROUP.KEY=VALUE  overrides any setting, e.g. --config.data.batch_size=256,
                          --config.vicreg.projector="(2048, 2048)"

The same command in the same workdir goes on from its newest checkpoint. SIGTERM
or Ctrl-C saves and leaves. Every setting is explained in cjepa_jax/config.py.

Into the workdir: config.json, checkpoints/, metrics.jsonl, tensorboard/,
curves.png, masks.png and, where probes run, evaluation.json.
"""

import pathlib
import re
import sys

from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from cjepa_jax.config import UserError, one_line, require
from cjepa_jax.parsing import parse

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment, e.g. configs/digits.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; default runs/<name of the config file>.")


def _parse_flags(argv: list[str]) -> None:
    """Flags as absl reads them; a mistake in them is one line."""
    if any(re.fullmatch("--?(help|helpshort)", argument) for argument in argv):
        print(__doc__.strip())
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except (AttributeError, KeyError) as error:  # ml_collections' way to say that the config lacks a key
        reason = str(error).replace("\\n", "\n").replace("\\'", "'").split("\n")[-1].strip("'\"")
        raise UserError(f"--config has no such setting: {reason}") from None
    except (flags.Error, OSError) as error:
        raise UserError(one_line(error)) from None
    require(not rest, f"unexpected argument {rest[0] if rest else ''!r}; --help explains the command")
    require(_CONFIG.value is not None, "--config is missing, e.g. --config=configs/digits.py")


def _run() -> None:
    from cjepa_jax import train  # after the flags: importing jax takes seconds

    path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    require(
        path.is_file(),
        f"--config {path} does not exist; known: {', '.join(map(str, sorted(pathlib.Path('configs').glob('*.py'))))}",
    )
    config = parse(_CONFIG.value.to_dict())
    workdir = _WORKDIR.value
    if workdir is None:
        workdir = f"runs/{path.stem}"
        pathlib.Path("runs").mkdir(exist_ok=True)
    require(bool(workdir), "--workdir is empty")
    try:
        train.train(config, epath.Path(workdir))
    except train.DivergedError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    try:
        logging.set_verbosity("error")  # TFDS' and Orbax' chatter
        _parse_flags(sys.argv)
        _run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
