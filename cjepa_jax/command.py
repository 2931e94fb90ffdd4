"""What the commands share: a config from the command line, and one line for a mistake."""

import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from cjepa_jax.config import Config, UserError, one_line, require
from cjepa_jax.parsing import parse

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment, e.g. configs/digits.py.")


def read_config(cls: Any = Config) -> tuple[str, Any]:
    """The name of --config's file, without .py, and what it describes, a `cls`, with the overrides applied.

    Raises UserError.
    """
    require(_CONFIG.value is not None, "--config is missing, e.g. --config=configs/digits.py")
    path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    require(
        path.is_file(),
        f"--config {path} does not exist; known: {', '.join(map(str, sorted(pathlib.Path('configs').glob('*.py'))))}",
    )
    return path.stem, parse(_CONFIG.value.to_dict(), cls)


class TrainingFlags:
    """The flags that every training has; to be made while its module is imported."""

    def __init__(self):
        self._workdir = flags.DEFINE_string(
            "workdir", None, "Where results go; default runs/<name of the config file>."
        )
        self._coordinator = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
        self._processes = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
        self._process = flags.DEFINE_integer("process_id", None, "Which of them this is.")
        self._timeout = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for one another.", lower_bound=1)

    def start(self, name: str) -> str:
        """Connects the processes; the workdir for a config file of this name. Raises UserError."""
        from cjepa_jax import hosts  # after the flags: importing jax takes seconds

        hosts.start(self._coordinator.value, self._processes.value, self._process.value, self._timeout.value)
        workdir = self._workdir.value
        if workdir is None:
            workdir = f"runs/{name}"
            pathlib.Path("runs").mkdir(exist_ok=True)
        require(bool(workdir), "--workdir is empty")
        return workdir


def run(body: Callable[[], None], doc: str, *, config: str | None = None) -> None:
    """Parses the flags and runs the body. Exit code 0; 2 after a mistake that the user can mend; 1 after other errors.

    doc: what --help prints. config: the --config of a command line that names none.
    """
    try:
        logging.set_verbosity("error")  # TFDS' and Orbax' chatter
        if config and not any(re.match("--?config(=|$)", argument) for argument in sys.argv):
            sys.argv.insert(1, f"--config={config}")
        _parse_flags(sys.argv, doc)
        body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parse_flags(argv: list[str], doc: str) -> None:
    """Flags as absl reads them; a mistake in them is one line."""
    if any(re.fullmatch("--?(help|helpshort)", argument) for argument in argv):
        print(doc.strip())
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except (AttributeError, KeyError) as error:  # ml_collections' way to say that the config lacks a key
        reason = str(error).replace("\\n", "\n").replace("\\'", "'").split("\n")[-1].strip("'\"")
        raise UserError(f"--config has no such setting: {reason}") from None
    except (flags.Error, OSError) as error:
        raise UserError(one_line(error)) from None
    require(not rest, f"unexpected argument {rest[0] if rest else ''!r}; --help explains the command")
