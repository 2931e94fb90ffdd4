"""Train: pre-training with C-JEPA or I-JEPA, fine-tuning, whatever the config's method is.

    python -m cjepa_jax.main --config=configs/vitb16.py

--config=FILE             the experiment, or the name of one that comes with the package,
                          such as vitb16; its docstring says what it needs
--workdir=DIR             where results go; default runs/<name of the config file>
--init=DIR                starts from the networks of another checkpoint instead of
                          random ones: a workdir, WORKDIR/checkpoints/STEP, a folder of
                          transformers, or what cjepa_jax.convert wrote; a checkpoint that
                          holds an encoder alone will do; fine-tuning needs one
--config.GROUP.KEY=VALUE  overrides any setting, e.g. --config.data.batch_size=256,
                          --config.vicreg.projector="(2048, 2048)"
--config=FILE --help      lists all settings of the experiment, with their meaning
--extend                  makes the run in the workdir longer: a larger optim.epochs is allowed,
                          and the schedules follow the new length from there on
--profile=START:STOP      records a trace of steps START + 1 to STOP in WORKDIR/profile

Several processes, each started with the same command, train as one. Slurm and TPU
slices are recognised; elsewhere each process is told

--coordinator_address=HOST:PORT  of process 0
--num_processes=N --process_id=0...N-1
--start_timeout=300       seconds to wait for one another

The same command in the same workdir goes on from its newest checkpoint. SIGTERM
or Ctrl-C saves and leaves; a second one, or one before the first step is compiled,
ends the run at once.

Exit codes: 0 finished, or stopped and saved, which the last line says; 2 a mistake
that the user can mend; 1 the loss is no longer finite, another process was lost, or
any other error; 130 and 143 ended at once by Ctrl-C and SIGTERM.

Into the workdir: config.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png
and, where there is something to show, masks.png and evaluation.json.
"""

import re
import sys

from absl import flags
from etils import epath

from cjepa_jax import command
from cjepa_jax.errors import require

_INIT = flags.DEFINE_string("init", None, "A checkpoint whose networks to start from.")
_EXTEND = flags.DEFINE_bool("extend", False, "Let optim.epochs be larger than it was in the workdir.")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, the steps to record a trace of.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; default runs/<name of the config file>.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is.")
_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for one another.", lower_bound=1)
flags.DEFINE_alias("checkpoint", "init")  # its name where fine-tuning had a command of its own


def _run() -> None:
    from cjepa_jax.methods import find_method  # after the flags: importing jax takes seconds
    from cjepa_jax.train import distributed, lock, loop, nonfinite

    steps = re.fullmatch(r"(\d+):(\d+)", _PROFILE.value or "0:0")
    profile = (int(steps[1]), int(steps[2])) if _PROFILE.value and steps else None
    require(
        bool(steps) and (profile is None or profile[0] < profile[1]),
        f"--profile={_PROFILE.value} must be START:STOP, two step numbers, the first below the second",
    )
    name, config = command.read_config(lambda values: find_method(values).settings)
    distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _TIMEOUT.value)
    workdir = command.workdir_of(_WORKDIR.value, name)
    try:
        init = epath.Path(_INIT.value) if _INIT.value else None
        loop.train(config, epath.Path(workdir), init, profile, extend=_EXTEND.value)
    except (nonfinite.DivergedError, lock.LockLostError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Runs the command; its exit codes are those that --help names."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
