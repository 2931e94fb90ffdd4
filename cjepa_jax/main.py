"""Pre-train C-JEPA.

    python -m cjepa_jax.main --config=configs/vitb16.py

--config=FILE             the experiment; its docstring says what it needs
--workdir=DIR             where results go; default runs/<name of the config file>
--init=DIR                starts from the networks of another checkpoint instead of
                          random ones: a workdir, or what cjepa_jax.convert wrote
--config.GROUP.KEY=VALUE  overrides any setting, e.g. --config.data.batch_size=256,
                          --config.vicreg.projector="(2048, 2048)"

Several processes, each started with the same command, train as one. Slurm and TPU
slices are recognised; elsewhere each process is told

--coordinator_address=HOST:PORT  of process 0
--num_processes=N --process_id=0...N-1
--start_timeout=300       seconds to wait for one another

The same command in the same workdir goes on from its newest checkpoint. SIGTERM
or Ctrl-C saves and leaves. Every setting is explained in cjepa_jax/config.py.

Into the workdir: config.json, checkpoints/, metrics.jsonl, tensorboard/,
curves.png, masks.png and, where probes run, evaluation.json.
"""

import sys

from absl import flags
from etils import epath

from cjepa_jax import command

_INIT = flags.DEFINE_string("init", None, "A checkpoint whose networks to start from.")
_FLAGS = command.TrainingFlags()


def _run() -> None:
    from cjepa_jax import loop, train  # after the flags: importing jax takes seconds

    name, config = command.read_config()
    workdir = _FLAGS.start(name)
    try:
        train.train(config, epath.Path(workdir), init=epath.Path(_INIT.value) if _INIT.value else None)
    except loop.DivergedError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Exit code 0; 2 after a mistake that the user can mend; 1 after any other error."""
    command.run(_run, __doc__)


if __name__ == "__main__":
    main()
